//! Accepted documents can be parsed, and no input makes this crate panic.

use proptest::prelude::*;
use serde_json::{Value, json};
use virtiofs_crds::export::export_spec;
use virtiofs_crds::{Interval, Share, ShareName, VirtiofsExport, VirtiofsExportSpec, read_text, validate};

/// Pieces that paths, names, modes and durations are made of, right and wrong ones.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("/"),
        Just("."),
        Just(".."),
        Just("a"),
        Just("Z"),
        Just("0"),
        Just("7"),
        Just("66"),
        Just("-"),
        Just("s"),
        Just("m"),
        Just("h"),
        Just("ms"),
        Just("99999"),
        Just("proc"),
        Just("\u{e9}"),
        Just("\u{0}"),
        Just("\n"),
        Just(" "),
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        pieces().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        let key = prop_oneof![
            Just("spec"),
            Just("source"),
            Just("hostPath"),
            Just("engine"),
            Just("metadata"),
            Just("name"),
            Just("nodes"),
            Just("selector")
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.prop_map(str::to_owned), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_the_schema_accepts_parses(
        name in pieces(), path in pieces(), mode in pieces(), timeout in pieces(), window in pieces(), content in 0..3usize,
    ) {
        let document = json!({
            "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "metadata": {"name": name},
            "spec": {
                "source": {"hostPath": {"path": format!("/{path}")}},
                "content": (["Immutable", "Exclusive", "Shared"][content]),
                "socket": {"mode": mode},
                "engine": {"entryTimeout": timeout},
                "staleness": {"window": window},
            },
        });
        let sound = validate::validate(&document, None).is_ok();
        prop_assert_eq!(sound, Share::from_value(&document).is_ok());
    }

    #[test]
    fn the_schema_and_the_types_agree_on_each_field(text in pieces()) {
        let accepts = |field: &str, value: Value| {
            let mut document = json!({
                "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "metadata": {"name": "a"},
                "spec": {"source": {"hostPath": {"path": "/srv"}}, "content": "Immutable"},
            });
            *document.pointer_mut(field).unwrap() = value;
            validate::validate(&document, None).is_ok()
        };
        let interval = text.parse::<Interval>().is_ok_and(|interval| interval.millis() <= 86_400_000);
        prop_assert_eq!(accepts("/spec", json!({
            "source": {"hostPath": {"path": "/srv"}}, "content": "Immutable", "engine": {"entryTimeout": text.clone()},
        })), interval, "{:?}", text);
        prop_assert_eq!(accepts("/metadata/name", json!(text.clone())), ShareName::parse(&text).is_ok(), "{:?}", text);
    }

    #[test]
    fn no_json_makes_it_panic(spec in json_values(), metadata in json_values()) {
        let document = json!({
            "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "metadata": metadata, "spec": spec,
        });
        let _ = Share::from_value(&document);
        let _ = Share::from_value(&spec);
        let _ = validate::validate(&document, Some(&spec));
    }

    #[test]
    fn no_text_makes_it_panic(text in "[-:{}\\[\\]&*!|>'\"#%@` \n\ta-c0-9]{0,200}") {
        let _ = read_text("a.yaml".as_ref(), &text);
    }
}

/// The spec of an export contains the resolved configuration, which the API server validates too.
#[test]
fn a_resolved_configuration_is_valid_and_stays_the_same() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/manifests/good");
    for document in virtiofs_crds::read_directory(folder.as_ref()).unwrap().documents {
        let spec = export_spec(&document.share, &document.object.spec);
        assert_eq!(spec.engine.config(document.share.access), document.share.engine, "{}", document.origin);
        let export = VirtiofsExport::new("any", VirtiofsExportSpec { node_name: "n1".into(), ..spec });
        assert_eq!(validate::validate_export(&export), Ok(()), "{}", document.origin);
    }
}
