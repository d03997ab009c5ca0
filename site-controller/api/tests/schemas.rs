//! `docs/schema/` is what the types say. `SKEIN_BLESS=1 cargo test -p skein-api` writes it anew.

use std::{fs, path::PathBuf};

use schemars::{JsonSchema, generate::SchemaSettings};
use skein_api::{
    AccessGrantSpec, AccessTokenSpec, ConnectorSpec, LinkSpec, ListenerSpec, Manifest, SiteSpec,
    Spec, status,
};

fn schema<T: JsonSchema>(id: &str) -> serde_json::Value {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>();
    let mut schema = schema.to_value();
    schema["$id"] = format!("https://skein.dev/schema/v1alpha1/{id}.json").into();
    schema
}

/// The schema of a resource, narrowed to its kind and version: that is what editors complete.
fn resource<S: Spec>() -> (String, serde_json::Value) {
    let id = S::KIND.as_str().to_lowercase();
    let mut schema = schema::<Manifest<S>>(&id);
    schema["title"] = S::KIND.as_str().into();
    schema["properties"]["apiVersion"]["const"] = skein_api::API_VERSION.into();
    schema["properties"]["kind"] = serde_json::json!({ "const": S::KIND.as_str() });
    (id, schema)
}

#[test]
fn the_schemas_are_current() {
    let mut schemas = vec![
        resource::<SiteSpec>(),
        resource::<LinkSpec>(),
        resource::<AccessGrantSpec>(),
        resource::<AccessTokenSpec>(),
        resource::<ListenerSpec>(),
        resource::<ConnectorSpec>(),
    ];
    let documents = [
        ("status", schema::<status::SiteStatus>("status")),
        ("network-status", schema::<status::NetworkStatus>("network-status")),
        ("link-list", schema::<Vec<status::LinkRow>>("link-list")),
        ("service-list", schema::<Vec<status::ServiceRow>>("service-list")),
        ("token-list", schema::<Vec<status::TokenRow>>("token-list")),
        ("trace", schema::<status::TraceReport>("trace")),
        ("doctor", schema::<Vec<status::DoctorFinding>>("doctor")),
        ("version", schema::<status::VersionInfo>("version")),
    ];
    schemas.extend(documents.map(|(id, schema)| (id.to_owned(), schema)));
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/schema");
    let bless = std::env::var_os("SKEIN_BLESS").is_some();
    for (id, schema) in schemas {
        let path = dir.join(format!("{id}.json"));
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if bless {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "{} is stale; run: SKEIN_BLESS=1 cargo test -p skein-api",
            path.display()
        );
    }
}
