//! All writes of the operator to the cluster, except Events and the lease.

use std::fmt::Debug;
use std::sync::Arc;

use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::is_gone;
use crate::metrics::Metrics;

/// The field manager of every operator: one continues where another stopped.
pub(crate) const FIELD_MANAGER: &str = "virtiofs-operator";

/// Writes objects, and counts the writes.
#[derive(Clone)]
pub(crate) struct Writer {
    /// The client.
    pub(crate) client: Client,
    metrics: Arc<Metrics>,
}

impl Writer {
    /// A writer that uses this client.
    pub(crate) fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Writer { client, metrics }
    }

    /// Applies an object. An object that exists must carry its uid: without it, the apply would create the object again
    /// after a deletion.
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

    /// Applies the fields of an object that the operator owns.
    pub(crate) async fn apply_value<K>(&self, name: &str, object: &(impl Serialize + Debug)) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _write = self.begin::<K>("apply").await;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        Api::all(self.client.clone()).patch(name, &parameters, &Patch::Apply(object)).await
    }

    /// Applies the status of an object.
    pub(crate) async fn apply_status<K>(&self, name: &str, object: &Value) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _write = self.begin::<K>("apply_status").await;
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        Api::all(self.client.clone()).patch_status(name, &parameters, &Patch::Apply(object)).await
    }

    /// Applies a merge patch to an object; with `metadata.uid` in it to that very object only.
    pub(crate) async fn merge<K>(&self, name: &str, patch: &Value) -> kube::Result<K>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _write = self.begin::<K>("merge").await;
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        Api::all(self.client.clone()).patch(name, &parameters, &Patch::Merge(patch)).await
    }

    /// Deletes this very object. Idempotent: an object that is gone, or was replaced by another, counts as deleted.
    pub(crate) async fn delete<K>(&self, object: &K) -> kube::Result<()>
    where
        K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let _write = self.begin::<K>("delete").await;
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

/// A write in progress; only tests stop before one.
#[cfg(not(feature = "die-at-write"))]
struct Step;

#[cfg(not(feature = "die-at-write"))]
async fn step() -> Step {
    Step
}
