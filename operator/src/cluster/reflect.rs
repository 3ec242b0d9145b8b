//! Reflects what the operator reads, and says whose turn it is when something has changed.

use std::collections::HashMap;
use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use super::facts::{NodeFacts, agent_of, trim_metadata, trim_node, trim_pod};

/// What is reflected.
pub(crate) struct Cluster {
    /// All shares.
    pub(crate) shares: Store<VirtiofsShare>,
    exports: Store<VirtiofsExport>,
    nodes: Store<Node>,
    agents: Option<Store<Pod>>,
}

/// Who is to be looked at.
pub(crate) struct Triggers {
    /// Shares.
    pub(crate) shares: UnboundedReceiver<ObjectRef<VirtiofsShare>>,
    /// Nodes.
    pub(crate) nodes: UnboundedReceiver<ObjectRef<Node>>,
}

/// Where triggers go. Nobody is there to take them only when the program ends.
#[derive(Clone)]
struct Bell {
    shares: UnboundedSender<ObjectRef<VirtiofsShare>>,
    nodes: UnboundedSender<ObjectRef<Node>>,
}

impl Bell {
    fn share(&self, name: &str) {
        let _ = self.shares.send(ObjectRef::new(name));
    }

    fn node(&self, name: &str) {
        let _ = self.nodes.send(ObjectRef::new(name));
    }

    fn all(&self, shares: &Store<VirtiofsShare>) {
        shares.state().iter().for_each(|share| self.share(&share.name_any()));
    }
}

/// Begins to reflect; `watches` has the tasks that do it, which never end.
pub(crate) fn reflect(
    client: &Client,
    agents: Option<(&str, &str)>,
    watches: &mut JoinSet<()>,
) -> (Arc<Cluster>, Triggers) {
    let (share_bell, shares_rung) = unbounded_channel();
    let (node_bell, nodes_rung) = unbounded_channel();
    let bell = Bell { shares: share_bell, nodes: node_bell };
    let all = watcher::Config::default();

    let (shares, watch) = follow(Api::<VirtiofsShare>::all(client.clone()), all.clone(), trim, {
        let bell = bell.clone();
        move |share, _| bell.share(&share.name_any())
    });
    watches.spawn(watch);

    let (exports, watch) = follow(Api::<VirtiofsExport>::all(client.clone()), all.clone(), trim, {
        let bell = bell.clone();
        move |export, _| {
            bell.share(&export.spec.share_name);
            bell.node(&export.spec.node_name);
        }
    });
    watches.spawn(watch);

    let (nodes, watch) = follow(Api::<Node>::all(client.clone()), all, trim_node, {
        let (bell, shares, mut known) = (bell.clone(), shares.clone(), HashMap::new());
        move |node, gone| {
            // A node's heart beats; shares want to know only of what matters to them.
            let facts = (!gone).then(|| NodeFacts::of(node, None));
            let before = match &facts {
                Some(facts) => known.insert(node.name_any(), facts.clone()),
                None => known.remove(&node.name_any()),
            };
            if before != facts {
                bell.all(&shares);
                bell.node(&node.name_any());
            }
        }
    });
    watches.spawn(watch);

    let agents = agents.map(|(namespace, selector)| {
        let config = watcher::Config::default().labels(selector);
        let (shares, mut known) = (shares.clone(), HashMap::new());
        let (agents, watch) =
            follow(Api::<Pod>::namespaced(client.clone(), namespace), config, trim_pod, move |pod, gone| {
                let state = agent_of(pod).filter(|_| !gone).map(|(node, ready)| (node.to_owned(), ready));
                if known.insert(pod.name_any(), state.clone()) != Some(state) {
                    bell.all(&shares);
                }
                if gone {
                    known.remove(&pod.name_any());
                }
            });
        watches.spawn(watch);
        agents
    });
    (Arc::new(Cluster { shares, exports, nodes, agents }), Triggers { shares: shares_rung, nodes: nodes_rung })
}

fn trim<K: Resource>(object: &mut K) {
    trim_metadata(object.meta_mut());
}

/// A reflection of all objects of a kind, and what keeps it up to date and calls `changed` for each object that came,
/// changed, or (`true`) went.
fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    trim: impl FnMut(&mut K) + Send + 'static,
    mut changed: impl FnMut(&K, bool) + Send + 'static,
) -> (Store<K>, impl Future<Output = ()> + Send + 'static)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = store();
    let seen = reader.clone();
    let watch = async move {
        let events = watcher(api, config).modify(trim).default_backoff().reflect(writer);
        pin_mut!(events);
        let (mut broken, mut before) = (false, Vec::new());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object)) => changed(&object, false),
                Ok(Event::Delete(object)) => changed(&object, true),
                // What went while nobody watched is told by nobody: it was there before, and is not any more.
                Ok(Event::Init) => before = seen.state(),
                Ok(Event::InitDone) => {
                    let gone = |object: &&Arc<K>| seen.get(&ObjectRef::from_obj(object.as_ref())).is_none();
                    before.iter().filter(gone).for_each(|object| changed(object, true));
                    before.clear();
                    seen.state().iter().for_each(|object| changed(object, false));
                    if std::mem::take(&mut broken) {
                        tracing::info!(kind = %K::kind(&()), "watching again");
                    }
                }
                Ok(_) => {}
                Err(error) if !broken => {
                    broken = true;
                    tracing::warn!(kind = %K::kind(&()), %error, "cannot watch; trying again");
                }
                Err(_) => {}
            }
        }
    };
    (reader, watch)
}

impl Cluster {
    /// Waits until everything has been read once.
    ///
    /// # Errors
    /// A watch has ended.
    pub(crate) async fn complete(&self) -> anyhow::Result<()> {
        self.shares.wait_until_ready().await?;
        self.exports.wait_until_ready().await?;
        self.nodes.wait_until_ready().await?;
        if let Some(agents) = &self.agents {
            agents.wait_until_ready().await?;
        }
        Ok(())
    }

    /// All nodes.
    pub(crate) fn nodes(&self) -> Vec<NodeFacts> {
        let pods = self.agents.as_ref().map(Store::state);
        let agents: Option<HashMap<&str, bool>> = pods.as_ref().map(|pods| {
            let mut ready = HashMap::new();
            for (node, is_ready) in pods.iter().filter_map(|pod| agent_of(pod)) {
                *ready.entry(node).or_insert(false) |= is_ready;
            }
            ready
        });
        let agent = |node: &str| agents.as_ref().map(|agents| agents.get(node).copied().unwrap_or(false));
        self.nodes.state().iter().map(|node| NodeFacts::of(node, agent(&node.name_any()))).collect()
    }

    /// The exports of a share.
    pub(crate) fn exports_of(&self, share: &str) -> Vec<Arc<VirtiofsExport>> {
        self.exports.state_filter(|export| export.spec.share_name == share)
    }

    /// The exports on a node.
    pub(crate) fn exports_on(&self, node: &str) -> Vec<Arc<VirtiofsExport>> {
        self.exports.state_filter(|export| export.spec.node_name == node)
    }

    /// The nodes' reflection.
    pub(crate) fn node_store(&self) -> Store<Node> {
        self.nodes.clone()
    }
}
