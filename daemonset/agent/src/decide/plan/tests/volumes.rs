use virtiofs_config::EngineConfig;
use virtiofs_contract::control::Released;

use super::*;
use crate::fixtures::{volume, volumes};
use crate::model::volume::{Volume, Volumes};

/// The endpoint of a volume as it follows from its share.
fn published(share: &Share, volume: &Volume) -> Endpoint {
    let mut observed = Observed::default();
    observed.update_volumes(Some(volumes([volume.clone()])));
    let wanted = endpoints_of(share, &observed.requested).nth(1).unwrap();
    wanted.resolve(&site().runtime_dir, &source("/srv/a", 2))
}

#[test]
fn a_volume_follows_its_share() {
    let now = Instant::now();
    let mut share = declared("a", "/srv/a");
    (share.socket.owner, share.socket.group) = (Some(107), Some(6));
    let volume = Volume { mount_group: Some(1000), ..volume("a", "one") };
    let own = own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2));
    let there = published(&share, &volume);
    let SocketSpec { path, owner, group, mode } = there.socket.clone();
    assert_eq!((path, there.kind), (volume.target_path.join("virtiofs.sock"), EndpointKind::Volume));
    assert_eq!((owner, group, mode), (Some(107), Some(1000), share.socket.mode));
    assert_eq!(there.consumer.as_deref(), Some("pod vms/vm-1"));

    let mut with_finding = listening(there.clone());
    with_finding.preflight.findings.push(finding());
    let mut known = observed(vec![listening(own), with_finding], vec![("a", present(now, "/srv/a"))]);
    known.update_volumes(Some(volumes([volume.clone()])));
    assert_eq!(plan(now, &site(), &desired([share.clone()]), &known).actions, []);

    share.engine = EngineConfig { xattr: true, ..share.engine };
    known.endpoints.as_mut().unwrap().get_mut("a").unwrap().endpoint.engine = share.engine.clone();
    let actions = plan(now, &site(), &desired([share.clone()]), &known).actions;
    assert!(
        matches!(&actions[..], [Action::Apply { endpoint, .. }] if **endpoint == published(&share, &volume)),
        "{actions:?}"
    );
}

#[test]
fn a_directory_that_hangs_blocks_only_trials_on_it() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let own = listening(own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
    let below = |name: &str, path: &str| Volume { sub_path: Some(path.into()), ..volume("a", name) };
    let (one, beside, other) = (below("one", "x"), below("beside", "x"), below("other", "y"));
    for (hangs, applied) in [(one.endpoint_name(), vec![other.endpoint_name()]), ("a".to_owned(), vec![])] {
        let mut known = observed(vec![own.clone()], vec![("a", present(now, "/srv/a"))]);
        let source = source("/srv/a", 2);
        known.update_volumes(Some(volumes([one.clone()])));
        let tried = endpoints_of(&share, &known.requested).find(|it| it.name == hangs).unwrap();
        let endpoint = Box::new(tried.resolve(&site().runtime_dir, &source));
        known.begin(now, &Action::Apply { endpoint, source });
        known.update_volumes(Some(volumes([one.clone(), beside.clone(), other.clone()])));
        let actions = plan(now, &site(), &desired([share.clone()]), &known).actions;
        let names = actions.iter().map(|action| match action {
            Action::Apply { endpoint, .. } => endpoint.name.clone(),
            other => panic!("{other:?}"),
        });
        assert_eq!(names.collect::<Vec<_>>(), applied);
    }
}

#[test]
fn a_volume_of_a_released_share_waits() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let mut own = listening(own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
    for (released, applied) in [(Some(Released { until: 1_700_000_000 }), 0), (None, 1)] {
        own.released = released;
        let mut known = observed(vec![own.clone()], vec![("a", present(now, "/srv/a"))]);
        known.update_volumes(Some(volumes([volume("a", "one")])));
        assert_eq!(plan(now, &site(), &desired([share.clone()]), &known).actions.len(), applied);
    }
}

#[test]
fn a_removed_volume_is_ended_at_once() {
    let now = Instant::now();
    let volume = volume("a", "one");
    let name = volume.endpoint_name();
    let partial = Desired { partial: true, ..Desired::default() };
    let mut known = observed(vec![listening(published(&declared("a", "/srv/a"), &volume))], vec![]);
    let ends = [Action::Withdraw { endpoint: name.clone(), force: true }];
    for (volumes, expected) in [
        (None, &[][..]),
        (Some(volumes([volume.clone()])), &[]),
        (Some(Volumes { unreadable: [Volume::key(&volume.target_path)].into(), ..Volumes::default() }), &[]),
        (Some(Volumes::default()), &ends),
    ] {
        known.update_volumes(volumes);
        assert_eq!(plan(now, &site(), &partial, &known).actions, expected);
    }
    let late = now + 2 * WITHDRAW_AFTER;
    assert_eq!(plan(late, &site(), &Desired::default(), &known).actions, ends, "and not twice");
    known.progress.entry(name).or_default().busy_since = Some(now);
    assert_eq!(plan(now, &site(), &partial, &known).actions, []);
}
