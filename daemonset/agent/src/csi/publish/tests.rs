use std::fs;

use serde_json::json;

use super::*;
use crate::kubernetes::exports::tests::export;
use crate::report::{Report, ShareReport};
use crate::volume::tests::volume;

/// A publisher on a node where share `images` is served to pods of these namespaces.
fn publisher(scratch: &Path, consumers: &[&str]) -> Publisher {
    let mut exports = Exports::default();
    exports.put(export("images", json!({"consumers": {"namespaces": {"matchNames": consumers}}})), Instant::now());
    let registry = Arc::new(Registry::open(scratch.join("volumes")).unwrap());
    // Names decide who is admitted here: nobody is asked.
    let client = Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
    let turns = watch::Sender::new(turn(&registry, &[]));
    let publisher = Publisher {
        node: "n1".into(),
        kubelet: KubeletDir::new(scratch.into()),
        exports: watch::Sender::new(exports).subscribe(),
        turns: turns.subscribe(),
        registry: registry.clone(),
        refusals: Refusals::start(&client, "n1", refusals::RefusalCounts::default()),
        client,
        busy: Busy::default(),
    };
    let mut volumes = registry.follow();
    tokio::spawn(async move {
        while volumes.changed().await.is_ok() {
            turns.send_replace(turn(&registry, &[]));
        }
    });
    publisher
}

/// All that is asked for is served, and there is this to say of it.
fn turn(registry: &Registry, notices: &[Notice]) -> Turn {
    let share = ShareReport {
        name: "images".into(),
        state: if notices.is_empty() { ShareState::Ready } else { ShareState::Degraded },
        notices: notices.to_vec(),
        source: PathBuf::new(),
        socket: PathBuf::new(),
    };
    let volumes = registry.all().iter().map(|it| (it.endpoint_name(), Standing::Listening)).collect();
    let report = Report { broker: true, shares: vec![share], ..Report::default() };
    Turn { at: Some(Instant::now()), report, volumes, ..Turn::default() }
}

#[tokio::test]
async fn of_a_volume_that_is_no_longer_permitted_and_never_was_published_nothing_is_left() {
    let scratch = tempfile::tempdir().unwrap();
    let publisher = publisher(scratch.path(), &["others"]);
    for (published, left) in [(true, true), (false, false)] {
        let asked = Volume { target_path: scratch.path().join("mount"), ..volume("images", "one") };
        directory::make(&asked.target_path).unwrap();
        publisher.registry.put(&Volume { published, ..asked.clone() }).unwrap();
        let answer = publisher.publish(asked.clone()).await;
        assert_eq!(answer.err().map(|status| status.code()), (!left).then_some(Code::PermissionDenied));
        assert_eq!(publisher.registry.at(&asked.target_path).is_some(), left);
        assert_eq!(asked.target_path.exists(), left);
    }
}

#[tokio::test]
async fn nobody_is_let_in_while_the_source_is_released() {
    let scratch = tempfile::tempdir().unwrap();
    let mut publisher = publisher(scratch.path(), &["vms"]);
    for (reason, admitted) in [(Reason::CapabilityMissing, true), (Reason::SourceReleased, false)] {
        let notice = Notice::new(reason.as_str(), "m", "r");
        publisher.turns = watch::Sender::new(turn(&publisher.registry, &[notice])).subscribe();
        let refusal = publisher.ready("images").err();
        assert_eq!(refusal.is_none(), admitted);
        assert!(refusal.is_none_or(|status| {
            status.code() == Code::Unavailable && status.message().contains("SourceReleased")
        }));
    }
}

#[tokio::test]
async fn of_a_volume_that_cannot_be_noted_nothing_is_left() {
    let scratch = tempfile::tempdir().unwrap();
    let publisher = publisher(scratch.path(), &["vms"]);
    let asked = Volume { target_path: scratch.path().join("mount"), ..volume("images", "one") };
    publisher.registry.put(&asked).unwrap();
    let in_the_way = scratch.path().join("volumes").join(Volume::key(&asked.target_path)).with_extension("new");
    fs::create_dir(&in_the_way).unwrap();
    assert_eq!(publisher.publish(asked.clone()).await.unwrap_err().code(), Code::Internal);
    assert_eq!(publisher.registry.all(), []);
    assert!(!asked.target_path.exists());
    fs::remove_dir(&in_the_way).unwrap();
    publisher.publish(asked.clone()).await.unwrap();
    assert!(publisher.registry.at(&asked.target_path).unwrap().published);
}

#[test]
fn of_two_at_one_directory_the_second_is_told_to_come_again() {
    let busy = Busy::default();
    let first = busy.take(Path::new("/a")).ok().unwrap();
    assert_eq!(busy.take(Path::new("/a")).err().unwrap().code(), Code::Aborted);
    assert!(busy.take(Path::new("/b")).is_ok());
    drop(first);
    assert!(busy.take(Path::new("/a")).is_ok());
}

#[test]
fn what_was_published_stays_what_it_was() {
    let known = Volume { mount_group: Some(7), published: true, ..volume("images", "one") };
    assert_eq!(same(&known, &volume("images", "one")).unwrap(), &known);
    for other in [
        Volume { sub_path: Some("a".into()), ..known.clone() },
        Volume { share: "other".into(), ..known.clone() },
        Volume { volume_id: "another".into(), ..known.clone() },
    ] {
        assert_eq!(same(&known, &other).unwrap_err().code(), Code::AlreadyExists);
    }
}

#[test]
fn whoever_wrote_the_pod_is_told_why_and_no_path_of_the_node() {
    let notice = |reason: Reason| Notice::new(reason.as_str(), "/srv/secret is not there", "see /srv");
    for (reason, sub_path, expected) in [
        (Reason::SourceMissing, Some("a"), "SourceMissing: the share has no such directory"),
        (Reason::SourceForbidden, Some("a"), "SourceForbidden: it leads through a symbolic link, or may not be shared"),
        (Reason::SourceMissing, None, "SourceMissing: an admin sees why in the status"),
        (Reason::CapabilityMissing, Some("a"), "CapabilityMissing: an admin sees why in the status"),
    ] {
        let told = for_the_pod(&notice(reason), sub_path.map(Path::new));
        assert!(told.starts_with(expected) && !told.contains("/srv"), "{told}");
    }
}

#[test]
fn only_a_turn_that_began_after_the_question_answers_it() {
    let asked = Instant::now();
    let volumes = [("a.v-1".to_owned(), Standing::Listening)].into_iter().collect();
    let mut turn = Turn { at: Some(asked), volumes, ..Turn::default() };
    assert_eq!(standing(&turn, "a.v-1", asked), Some(Standing::Listening));
    assert_eq!(standing(&turn, "a.v-2", asked), None);
    turn.at = asked.checked_sub(Duration::from_millis(1));
    assert_eq!(standing(&turn, "a.v-1", asked), None);
}
