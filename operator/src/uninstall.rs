//! Prepares the removal of the chart. Fails while shares are in use; otherwise stops the operators and then removes their
//! finalizer from all shares, which could not be deleted without an operator.

mod users;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use self::users::Claims;
use crate::args::Uninstall;
use crate::error::Chain;
use crate::metrics::Metrics;
use crate::share::{FINALIZER, identity};
use crate::writer::Writer;

/// Number of objects in one response: a cluster has many pods, and few of them matter here.
const PAGE: u32 = 500;
/// Time between two checks whether the operators have ended.
const POLL: Duration = Duration::from_secs(1);

/// Prepares the removal of the chart.
///
/// # Errors
/// Shares are in use, with all their users; or the API server does not answer or does not permit it.
pub(crate) async fn prepare(namespace: &str, arguments: &Uninstall) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("cannot configure the client of the API server")?;
    fail_if_used(&client).await?;
    let operators = Operators { client: client.clone(), namespace, deployment: &arguments.deployment };
    let replicas = operators.scale(0).await?;
    let released = async {
        operators.until_gone(Duration::from_secs(arguments.wait_seconds)).await?;
        // VMs that connected meanwhile still have an agent and a broker.
        fail_if_used(&client).await?;
        remove_finalizers(&client).await
    };
    let shares = match released.await {
        Ok(shares) => shares,
        Err(error) => return Err(operators.restart(replicas, error).await),
    };
    tracing::info!(shares, "no share is in use; finalizers removed, shares stay");
    Ok(())
}

async fn fail_if_used(client: &Client) -> anyhow::Result<()> {
    let mut found = Vec::new();
    each(&Api::<DeserializeGuard<VirtiofsExport>>::all(client.clone()), "exports", |export: &VirtiofsExport| {
        found.extend(users::of_export(export))
    })
    .await?;
    let mut claims = Claims::default();
    each(&Api::<DeserializeGuard<PersistentVolume>>::all(client.clone()), "volumes", |volume: &PersistentVolume| {
        claims.add(volume)
    })
    .await?;
    each(&Api::<DeserializeGuard<Pod>>::all(client.clone()), "pods", |pod: &Pod| {
        found.extend(users::of_pod(pod, &claims))
    })
    .await?;
    ensure!(found.is_empty(), users::refusal(&found));
    Ok(())
}

/// Removes the operators' finalizer from all shares; returns their number.
async fn remove_finalizers(client: &Client) -> anyhow::Result<usize> {
    let mut protected = Vec::new();
    each(&Api::<DeserializeGuard<VirtiofsShare>>::all(client.clone()), "shares", |share: &VirtiofsShare| {
        if share.finalizers().iter().any(|it| it == FINALIZER) {
            protected.push((share.name_any(), identity(share)));
        }
    })
    .await?;
    let writer = Writer::new(client.clone(), Arc::new(Metrics::new()?));
    for (name, identity) in &protected {
        let applied = writer.apply_value::<VirtiofsShare>(name, identity).await;
        applied.with_context(|| format!("cannot remove the finalizer from share {name}"))?;
    }
    Ok(protected.len())
}

/// Calls `visit` for all objects of a kind, page by page.
///
/// # Errors
/// The list fails, or an object cannot be decoded: who uses it is then unknown.
async fn each<K>(api: &Api<DeserializeGuard<K>>, what: &str, mut visit: impl FnMut(&K)) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await.with_context(|| format!("cannot list {what}"))?;
        for object in &list.items {
            match &object.0 {
                Ok(object) => visit(object),
                Err(invalid) => bail!("cannot decode {} {}: {}", K::kind(&()), object.name_any(), invalid.error),
            }
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// The Deployment of the operators.
struct Operators<'a> {
    client: Client,
    namespace: &'a str,
    deployment: &'a str,
}

impl Operators<'_> {
    /// Sets the number of replicas; returns the number before.
    async fn scale(&self, replicas: i32) -> anyhow::Result<i32> {
        let api = Api::<Deployment>::namespaced(self.client.clone(), self.namespace);
        let what = || format!("cannot scale deployment {}/{}", self.namespace, self.deployment);
        let before = api.get_scale(self.deployment).await.with_context(what)?;
        let wanted = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        api.patch_scale(self.deployment, &PatchParams::default(), &wanted).await.with_context(what)?;
        Ok(before.spec.and_then(|spec| spec.replicas).unwrap_or_default())
    }

    /// Restores the number of replicas after a failure; returns the failure.
    async fn restart(&self, replicas: i32, why: anyhow::Error) -> anyhow::Error {
        match self.scale(replicas).await {
            Ok(_) => why,
            Err(error) => why.context(format!(
                "no operator is running, and the restart failed ({}); start it with `helm upgrade --force-conflicts`",
                Chain(error.as_ref())
            )),
        }
    }

    /// Waits until no operator is left that could add a finalizer.
    async fn until_gone(&self, timeout: Duration) -> anyhow::Result<()> {
        let Ok(gone) = tokio::time::timeout(timeout, self.gone()).await else {
            bail!(
                "the operators of deployment {}/{} have not ended within {} s; nothing has been removed",
                self.namespace,
                self.deployment,
                timeout.as_secs()
            );
        };
        gone
    }

    async fn gone(&self) -> anyhow::Result<()> {
        let scale = Api::<Deployment>::namespaced(self.client.clone(), self.namespace).get_scale(self.deployment).await;
        let selector =
            scale.context("cannot read the scale of the deployment")?.status.and_then(|status| status.selector);
        let selector = selector.context("the scale of the deployment has no selector")?;
        let pods = Api::<Pod>::namespaced(self.client.clone(), self.namespace);
        loop {
            let left = pods.list(&ListParams::default().labels(&selector)).await.context("cannot list operators")?;
            if left.items.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
