//! Before the chart is removed: refuses while shares are in use. Otherwise it ends the operators and then takes their
//! finalizer off all shares, which without an operator could never be deleted.

mod users;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use self::users::Claims;
use crate::args::Uninstall;
use crate::metrics::Metrics;
use crate::share::{FINALIZER, identity};
use crate::writer::Writer;

/// How many objects are asked for at a time: a cluster's pods are many, and few of them matter here.
const PAGE: u32 = 500;
/// How often it is looked whether operators have ended.
const LOOK: Duration = Duration::from_secs(1);

/// Makes ready for the chart's removal.
///
/// # Errors
/// When shares are in use, with everyone who uses them; when the API server does not answer or permit it.
pub(crate) async fn prepare(namespace: &str, arguments: &Uninstall) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("cannot tell how to reach the API server")?;
    refuse_if_used(&client).await?;
    let operators = Operators { client: client.clone(), namespace, deployment: &arguments.deployment };
    let replicas = operators.scale(0).await?;
    let let_go = async {
        operators.until_gone(Duration::from_secs(arguments.wait_seconds)).await?;
        // Whoever came meanwhile has an agent and a broker still.
        refuse_if_used(&client).await?;
        let_go(&client).await
    };
    let shares = match let_go.await {
        Ok(shares) => shares,
        Err(error) => return Err(operators.start_again(replicas, error).await),
    };
    tracing::info!(shares, "no share is in use; they stay, and may be deleted");
    Ok(())
}

async fn refuse_if_used(client: &Client) -> anyhow::Result<()> {
    let mut found = Vec::new();
    each(&Api::<VirtiofsExport>::all(client.clone()), "exports", |export| found.extend(users::of_export(export)))
        .await?;
    let mut claims = Claims::default();
    each(&Api::<PersistentVolume>::all(client.clone()), "volumes", |volume| claims.add(volume)).await?;
    each(&Api::<Pod>::all(client.clone()), "pods", |pod| found.extend(users::of_pod(pod, &claims))).await?;
    ensure!(found.is_empty(), users::refusal(&found));
    Ok(())
}

/// Takes the operators' finalizer off all shares; returns of how many.
async fn let_go(client: &Client) -> anyhow::Result<usize> {
    let mut protected = Vec::new();
    each(&Api::<VirtiofsShare>::all(client.clone()), "shares", |share| {
        if share.finalizers().iter().any(|it| it == FINALIZER) {
            protected.push((share.name_any(), identity(share)));
        }
    })
    .await?;
    let writer = Writer::new(client.clone(), Arc::new(Metrics::new()?));
    for (name, identity) in &protected {
        let applied = writer.apply_value::<VirtiofsShare>(name, identity).await;
        applied.with_context(|| format!("cannot take the finalizer off share {name}"))?;
    }
    Ok(protected.len())
}

/// Looks at all objects of a kind, a page at a time.
async fn each<K>(api: &Api<K>, what: &str, mut look: impl FnMut(&K)) -> anyhow::Result<()>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await.with_context(|| format!("cannot list {what}"))?;
        list.items.iter().for_each(&mut look);
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
    /// Says how many are to run; returns how many were.
    async fn scale(&self, replicas: i32) -> anyhow::Result<i32> {
        let api = Api::<Deployment>::namespaced(self.client.clone(), self.namespace);
        let what = || format!("cannot scale deployment {}/{}", self.namespace, self.deployment);
        let before = api.get_scale(self.deployment).await.with_context(what)?;
        let wanted = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        api.patch_scale(self.deployment, &PatchParams::default(), &wanted).await.with_context(what)?;
        Ok(before.spec.and_then(|spec| spec.replicas).unwrap_or_default())
    }

    /// What did not work leaves the cluster as it was: they run again. Returns why it did not work.
    async fn start_again(&self, replicas: i32, why: anyhow::Error) -> anyhow::Error {
        match self.scale(replicas).await {
            Ok(_) => why,
            Err(error) => why.context(format!(
                "no operator runs any more, and it could not be started again ({error:#}); start it with `helm upgrade \
                 --force-conflicts`"
            )),
        }
    }

    /// Waits until none is left that could put a finalizer on.
    async fn until_gone(&self, patience: Duration) -> anyhow::Result<()> {
        let Ok(gone) = tokio::time::timeout(patience, self.gone()).await else {
            bail!(
                "operators of deployment {}/{} do not end within {} s; nothing has been removed",
                self.namespace,
                self.deployment,
                patience.as_secs()
            );
        };
        gone
    }

    async fn gone(&self) -> anyhow::Result<()> {
        let scale = Api::<Deployment>::namespaced(self.client.clone(), self.namespace).get_scale(self.deployment).await;
        let selector = scale.context("cannot read which pods are operators")?.status.and_then(|status| status.selector);
        let selector = selector.context("the API server does not say which pods are operators")?;
        let pods = Api::<Pod>::namespaced(self.client.clone(), self.namespace);
        loop {
            let left = pods.list(&ListParams::default().labels(&selector)).await.context("cannot list operators")?;
            if left.items.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
