//! The one place where the operator changes something in the cluster.

use std::fmt::Debug;
use std::sync::Arc;

use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::metrics::Metrics;

/// Whom fields belong to that the operator applies. The same for every operator: one goes on where another stopped.
pub(crate) const FIELD_MANAGER: &str = "virtiofs-operator";

/// Writes, and counts what is written.
#[derive(Clone)]
pub(crate) struct Writer {
    /// The client that everything goes through.
    pub(crate) client: Client,
    metrics: Arc<Metrics>,
}

impl Writer {
    /// Writes through this client.
    pub(crate) fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Writer { client, metrics }
    }

    /// Applies an object. One that was seen must carry its uid: without it, an object that was deleted meanwhile would
    /// come back.
    pub(crate) async fn apply<K>(&self, object: &K) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
            + Clone
            + DeserializeOwned
            + Serialize
            + Debug,
    {
        self.apply_value(&object.name_any(), object).await
    }

    /// Applies the fields of an object that the operator answers for.
    pub(crate) async fn apply_value<K>(&self, name: &str, object: &(impl Serialize + Debug)) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _under_way = self.begin::<K>("apply").await;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        Api::all(self.client.clone()).patch(name, &parameters, &Patch::Apply(object)).await
    }

    /// Applies the status of an object.
    pub(crate) async fn apply_status<K>(&self, name: &str, object: &Value) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _under_way = self.begin::<K>("apply_status").await;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        Api::all(self.client.clone()).patch_status(name, &parameters, &Patch::Apply(object)).await
    }

    /// Merges into an object what differs; with `metadata.uid` in it only into that very object.
    pub(crate) async fn merge<K>(&self, name: &str, difference: &Value) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _under_way = self.begin::<K>("merge").await;
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        Api::all(self.client.clone()).patch(name, &parameters, &Patch::Merge(difference)).await
    }

    /// Deletes this very object. One that is gone, or has become another, is as good as deleted.
    pub(crate) async fn delete<K>(&self, object: &K) -> kube::Result<()>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _under_way = self.begin::<K>("delete").await;
        let preconditions = Preconditions { uid: object.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match Api::<K>::all(self.client.clone()).delete(&object.name_any(), &parameters).await {
            Err(error) if is_gone(&error) => Ok(()),
            result => result.map(drop),
        }
    }

    async fn begin<K: Resource<DynamicType = ()>>(&self, verb: &str) -> Step {
        let step = step().await;
        self.metrics.writes.with_label_values(&[K::kind(&()).as_ref(), verb]).inc();
        step
    }
}

#[cfg(feature = "die-at-write")]
use crate::die_at_write::{Step, step};

/// A write that is under way; in tests there may be no next one.
#[cfg(not(feature = "die-at-write"))]
struct Step;

#[cfg(not(feature = "die-at-write"))]
async fn step() -> Step {
    Step
}

/// Is the object that this was about gone, or another one of that name?
pub(crate) fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
}
