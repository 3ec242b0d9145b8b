//! Watches what the operator reads, and requests reconciles of what changed.

use std::collections::HashMap;
use std::fmt::Debug;
use std::future::{Future, ready};
use std::sync::Arc;

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use super::decode::Decoder;
use super::facts::{NodeFacts, agent_of, trim_metadata, trim_node, trim_pod};
use crate::error::Chain;
use crate::metrics::Metrics;

/// The watched objects.
pub(crate) struct Cluster {
    /// All shares.
    pub(crate) shares: Store<VirtiofsShare>,
    exports: Store<VirtiofsExport>,
    nodes: Store<Node>,
    agents: Option<Store<Pod>>,
}

/// Requests for reconciles.
pub(crate) struct Requests {
    /// Of shares.
    pub(crate) shares: UnboundedReceiver<ObjectRef<VirtiofsShare>>,
    /// Of exports.
    pub(crate) exports: UnboundedReceiver<ObjectRef<VirtiofsExport>>,
    /// Of nodes.
    pub(crate) nodes: UnboundedReceiver<ObjectRef<Node>>,
}

/// Sends requests for reconciles. They have no receiver only when the program ends.
#[derive(Clone)]
struct Requester {
    shares: UnboundedSender<ObjectRef<VirtiofsShare>>,
    exports: UnboundedSender<ObjectRef<VirtiofsExport>>,
    nodes: UnboundedSender<ObjectRef<Node>>,
}

impl Requester {
    fn share(&self, name: &str) {
        let _ = self.shares.send(ObjectRef::new(name));
    }

    fn export(&self, name: &str) {
        let _ = self.exports.send(ObjectRef::new(name));
    }

    fn node(&self, name: &str) {
        let _ = self.nodes.send(ObjectRef::new(name));
    }

    fn all(&self, shares: &Store<VirtiofsShare>) {
        shares.state().iter().for_each(|share| self.share(&share.name_any()));
    }
}

/// Starts the watches as tasks that never end. `agents` is the namespace of the agents' pods and their label selector.
pub(crate) fn watch(
    client: &Client,
    agents: Option<(&str, &str)>,
    metrics: &Arc<Metrics>,
    tasks: &mut JoinSet<()>,
) -> (Arc<Cluster>, Requests) {
    let (share_sender, share_requests) = unbounded_channel();
    let (export_sender, export_requests) = unbounded_channel();
    let (node_sender, node_requests) = unbounded_channel();
    let requester = Requester { shares: share_sender, exports: export_sender, nodes: node_sender };
    let all = watcher::Config::default();

    let (exports, task) = follow(Api::all(client.clone()), all.clone(), metrics, trim::<VirtiofsExport>, {
        let requester = requester.clone();
        move |export, _| {
            requester.share(&export.spec.share_name);
            requester.export(&export.name_any());
            requester.node(&export.spec.node_name);
        }
    });
    tasks.spawn(task);

    let (shares, task) = follow(Api::all(client.clone()), all.clone(), metrics, trim::<VirtiofsShare>, {
        let (requester, exports) = (requester.clone(), exports.clone());
        move |share, deleted| {
            let name = share.name_any();
            requester.share(&name);
            if deleted {
                // Exports that have lost their owner stay behind.
                let left = exports.state_filter(|export: &VirtiofsExport| export.spec.share_name == name);
                left.iter().for_each(|export| requester.export(&export.name_any()));
            }
        }
    });
    tasks.spawn(task);

    let (nodes, task) = follow(Api::all(client.clone()), all, metrics, trim_node, {
        let (requester, shares, mut known) = (requester.clone(), shares.clone(), HashMap::new());
        move |node: &Node, deleted| {
            // Kubelets update their nodes all the time; shares depend on few of the fields.
            let facts = (!deleted).then(|| NodeFacts::of(node, None));
            let before = match &facts {
                Some(facts) => known.insert(node.name_any(), facts.clone()),
                None => known.remove(&node.name_any()),
            };
            if before != facts {
                requester.all(&shares);
                requester.node(&node.name_any());
            }
        }
    });
    tasks.spawn(task);

    let agents = agents.map(|(namespace, selector)| {
        let config = watcher::Config::default().labels(selector);
        let (shares, mut known) = (shares.clone(), HashMap::new());
        let pods = Api::namespaced(client.clone(), namespace);
        let (agents, task) = follow(pods, config, metrics, trim_pod, move |pod: &Pod, deleted| {
            let state = agent_of(pod).filter(|_| !deleted).map(|(node, ready)| (node.to_owned(), ready));
            if known.insert(pod.name_any(), state.clone()) != Some(state) {
                requester.all(&shares);
            }
            if deleted {
                known.remove(&pod.name_any());
            }
        });
        tasks.spawn(task);
        agents
    });
    let requests = Requests { shares: share_requests, exports: export_requests, nodes: node_requests };
    (Arc::new(Cluster { shares, exports, nodes, agents }), requests)
}

fn trim<K: Resource>(object: &mut K) {
    trim_metadata(object.meta_mut());
}

/// A store of all objects of a kind, and the task that updates it and calls `changed` for each object that was added,
/// changed or (`true`) deleted.
fn follow<K>(
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
    metrics: &Arc<Metrics>,
    trim: impl FnMut(&mut K) + Send + 'static,
    mut changed: impl FnMut(&K, bool) + Send + 'static,
) -> (Store<K>, impl Future<Output = ()> + Send + 'static)
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = store();
    let seen = reader.clone();
    let mut decoder = Decoder::new(reader.clone(), metrics.clone());
    let task = async move {
        let events = watcher(api, config).default_backoff();
        let decoded = events.filter_map(move |event| {
            ready(match event {
                Ok(event) => decoder.decode(event).map(Ok),
                Err(error) => Some(Err(error)),
            })
        });
        let events = decoded.modify(trim).reflect(writer);
        pin_mut!(events);
        let (mut broken, mut before) = (false, Vec::new());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object)) => changed(&object, false),
                Ok(Event::Delete(object)) => changed(&object, true),
                // A list does not name objects that were deleted while the watch was interrupted.
                Ok(Event::Init) => before = seen.state(),
                Ok(Event::InitDone) => {
                    let gone = |object: &&Arc<K>| seen.get(&ObjectRef::from_obj(object.as_ref())).is_none();
                    before.iter().filter(gone).for_each(|object| changed(object, true));
                    before.clear();
                    seen.state().iter().for_each(|object| changed(object, false));
                    if std::mem::take(&mut broken) {
                        tracing::info!(kind = %K::kind(&()), "watch restored");
                    }
                }
                Ok(Event::InitApply(_)) => {}
                Err(error) if !broken => {
                    broken = true;
                    tracing::warn!(kind = %K::kind(&()), error = %Chain(&error), "watch failed; it is repeated");
                }
                Err(_) => {}
            }
        }
    };
    (reader, task)
}

impl Cluster {
    /// Waits until everything has been listed once.
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

    /// The store of exports.
    pub(crate) fn export_store(&self) -> Store<VirtiofsExport> {
        self.exports.clone()
    }

    /// The store of nodes.
    pub(crate) fn node_store(&self) -> Store<Node> {
        self.nodes.clone()
    }
}
