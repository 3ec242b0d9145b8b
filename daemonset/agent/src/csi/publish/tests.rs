use std::fs;

use kube::core::DeserializeGuard;
use serde_json::json;
use virtiofs_client::report::{Report, ShareReport};

use super::*;
use crate::fixtures::volume;
use crate::kubernetes::exports::tests::export;

/// A publisher on a node where share `images` is served to pods of these namespaces.
fn publisher(scratch: &Path, consumers: &[&str]) -> Publisher {
    let mut exports = Exports::default();
    let export = export("images", json!({"consumers": {"namespaces": {"matchNames": consumers}}}));
    exports.put(DeserializeGuard(Ok(export)), Instant::now());
    let registry = Arc::new(Registry::open(scratch.join("volumes")).unwrap());
    // Namespaces are admitted by name here: no request is sent.
    let client = Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
    let passes = watch::Sender::new(pass(&registry, &[]));
    let publisher = Publisher {
        node: "n1".into(),
        kubelet: KubeletDir::new(scratch.into()),
        exports: watch::Sender::new(exports).subscribe(),
        passes: passes.subscribe(),
        registry: registry.clone(),
        rejections: Rejections::start(&client, "n1", rejections::RejectionCounts::default()),
        client,
        limits: VolumeLimits { pod: 2, namespace: 16, share: 16 },
        busy: Busy::default(),
    };
    let mut volumes = registry.follow();
    tokio::spawn(async move {
        while volumes.changed().await.is_ok() {
            passes.send_replace(pass(&registry, &[]));
        }
    });
    publisher
}

/// A pass in which every volume is served and the share has these notices.
fn pass(registry: &Registry, notices: &[Notice]) -> Pass {
    let share = ShareReport {
        name: "images".into(),
        state: if notices.is_empty() { ShareState::Ready } else { ShareState::Degraded },
        notices: notices.to_vec(),
        source: PathBuf::new(),
        socket: PathBuf::new(),
    };
    let volumes = registry.all().iter().map(|it| (it.endpoint_name(), VolumeState::Listening)).collect();
    let report = Report { broker: true, shares: vec![share], ..Report::default() };
    Pass { at: Some(Instant::now()), report, volumes, ..Pass::default() }
}

#[tokio::test]
async fn an_unpublished_volume_without_permission_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    let publisher = publisher(scratch.path(), &["others"]);
    for (published, left) in [(true, true), (false, false)] {
        let requested = Volume { target_path: scratch.path().join("mount"), ..volume("images", "one") };
        directory::make(&requested.target_path).unwrap();
        publisher.registry.put(&Volume { published, ..requested.clone() }).unwrap();
        let answer = publisher.publish(requested.clone()).await;
        assert_eq!(answer.err().map(|status| status.code()), (!left).then_some(Code::PermissionDenied));
        assert_eq!(publisher.registry.at(&requested.target_path).is_some(), left);
        assert_eq!(requested.target_path.exists(), left);
    }
}

#[tokio::test]
async fn no_volume_is_published_while_the_source_is_released() {
    let scratch = tempfile::tempdir().unwrap();
    let mut publisher = publisher(scratch.path(), &["vms"]);
    for (reason, admitted) in [(Reason::CapabilityMissing, true), (Reason::SourceReleased, false)] {
        let notice = Notice::new(NoticeReason::Finding(reason), "m", "r");
        publisher.passes = watch::Sender::new(pass(&publisher.registry, &[notice])).subscribe();
        let refusal = publisher.ready("images").err();
        assert_eq!(refusal.is_none(), admitted);
        assert!(refusal.is_none_or(|status| {
            status.code() == Code::Unavailable && status.message().contains("SourceReleased")
        }));
    }
}

#[tokio::test]
async fn a_volume_that_cannot_be_stored_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    let publisher = publisher(scratch.path(), &["vms"]);
    let requested = Volume { target_path: scratch.path().join("mount"), ..volume("images", "one") };
    publisher.registry.put(&requested).unwrap();
    let in_the_way = scratch.path().join("volumes").join(Volume::key(&requested.target_path)).with_extension("new");
    fs::create_dir(&in_the_way).unwrap();
    assert_eq!(publisher.publish(requested.clone()).await.unwrap_err().code(), Code::Internal);
    assert_eq!(publisher.registry.all(), []);
    assert!(!requested.target_path.exists());
    fs::remove_dir(&in_the_way).unwrap();
    publisher.publish(requested.clone()).await.unwrap();
    assert!(publisher.registry.at(&requested.target_path).unwrap().published);
}

#[test]
fn a_second_call_for_a_directory_is_aborted() {
    let busy = Busy::default();
    let first = busy.take(Path::new("/a")).ok().unwrap();
    assert_eq!(busy.take(Path::new("/a")).err().unwrap().code(), Code::Aborted);
    assert!(busy.take(Path::new("/b")).is_ok());
    drop(first);
    assert!(busy.take(Path::new("/a")).is_ok());
}

#[test]
fn a_published_volume_keeps_its_attributes() {
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
fn messages_for_pods_have_no_path_of_the_node() {
    let notice = |reason: Reason| Notice::new(NoticeReason::Finding(reason), "/srv/secret is not there", "see /srv");
    for (reason, sub_path, expected) in [
        (Reason::SourceMissing, Some("a"), "SourceMissing: the share has no such directory"),
        (Reason::SourceForbidden, Some("a"), "SourceForbidden: it leads through a symbolic link, or may not be shared"),
        (Reason::SourceMissing, None, "SourceMissing: an admin sees why in the status"),
        (Reason::CapabilityMissing, Some("a"), "CapabilityMissing: an admin sees why in the status"),
    ] {
        let message = for_the_pod(&notice(reason), sub_path.map(Path::new));
        assert!(message.starts_with(expected) && !message.contains("/srv"), "{message}");
    }
}

#[test]
fn only_a_pass_after_the_request_counts() {
    let requested = Instant::now();
    let volumes = [("a.volume.1".to_owned(), VolumeState::Listening)].into_iter().collect();
    let mut pass = Pass { at: Some(requested), volumes, ..Pass::default() };
    assert_eq!(volume_state(&pass, "a.volume.1", requested), Some(VolumeState::Listening));
    assert_eq!(volume_state(&pass, "a.volume.2", requested), None);
    pass.at = requested.checked_sub(Duration::from_millis(1));
    assert_eq!(volume_state(&pass, "a.volume.1", requested), None);
}

#[tokio::test]
async fn a_pod_with_too_many_volumes_is_rejected_and_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let publisher = publisher(scratch.path(), &["vms"]);
    let at = |name: &str| Volume { target_path: scratch.path().join(name), ..volume("images", name) };
    for name in ["one", "two"] {
        publisher.publish(at(name)).await.unwrap();
    }
    let status = publisher.publish(at("three")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "the kubelet tries again");
    assert!(status.message().contains("--volumes-per-pod"), "{}", status.message());
    assert!(publisher.registry.at(&at("three").target_path).is_none() && !at("three").target_path.exists());
    publisher.publish(at("one")).await.expect("a volume that exists is published again");
    publisher.unpublish(&at("two").target_path).await.unwrap();
    publisher.publish(at("three")).await.unwrap();
}
