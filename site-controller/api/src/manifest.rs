//! The frame around every resource: `apiVersion`, `kind`, `metadata`, `spec`, `status`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    invalid::Invalids,
    resource::Kind,
    value::{NAME_LEN_MAX, valid_name},
};

/// The version of the resources of this crate.
pub const API_VERSION: &str = "skein.dev/v1alpha1";
/// Labels or annotations of one resource: far above what people write, low enough to keep a status document small.
const ENTRIES_MAX: usize = 64;
/// Longest key of a label or annotation, as in Kubernetes (prefix and name).
const KEY_LEN_MAX: usize = 317;
/// Longest label value, as in Kubernetes.
const LABEL_LEN_MAX: usize = 63;
/// Longest annotation value.
const ANNOTATION_LEN_MAX: usize = 16 * 1024;

/// What a kind of resource adds to the frame.
pub trait Spec: JsonSchema + Serialize + for<'de> Deserialize<'de> {
    /// The kind whose `spec` this is.
    const KIND: Kind;

    /// Rewrites what an earlier version took, and kept, in the form that the rules of this one ask for.
    fn normalise(&mut self) {}

    /// Adds every broken rule to `invalids`; fields are named from `spec`.
    fn validate(&self, invalids: &mut Invalids);
}

/// A resource of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest<S> {
    /// Always `skein.dev/v1alpha1`.
    pub api_version: String,
    /// The kind of the resource.
    pub kind: Kind,
    /// Name, labels and annotations.
    pub metadata: Metadata,
    /// What the user wants.
    pub spec: S,
    /// What is; written by the controller and ignored when applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<ResourceStatus>,
}

impl<S: Spec> Manifest<S> {
    /// A resource without labels, annotations and status.
    pub fn new(name: impl Into<String>, spec: S) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: S::KIND,
            metadata: Metadata { name: name.into(), ..Metadata::default() },
            spec,
            status: None,
        }
    }

    /// Checks every rule.
    ///
    /// # Errors
    /// All broken rules with their fields.
    pub fn validate(&self) -> Result<(), Invalids> {
        let mut invalids = Invalids::default();
        invalids.check(
            self.api_version == API_VERSION,
            "apiVersion",
            format!("must be {API_VERSION}"),
        );
        invalids.check(self.kind == S::KIND, "kind", format!("must be {}", S::KIND));
        self.metadata.validate(&mut invalids);
        self.spec.validate(&mut invalids);
        invalids.into_result()
    }
}

/// Name, labels and annotations of a resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// A DNS label, unique among the resources of its kind.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub name: String,
    /// For selecting.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// For notes of people and tools.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Metadata {
    fn validate(&self, invalids: &mut Invalids) {
        let rule = format!(
            "must be 1 to {NAME_LEN_MAX} characters of a-z, 0-9 and '-', with no '-' at either end"
        );
        invalids.check(valid_name(&self.name), "metadata.name", rule);
        let maps = [
            ("metadata.labels", &self.labels, LABEL_LEN_MAX),
            ("metadata.annotations", &self.annotations, ANNOTATION_LEN_MAX),
        ];
        for (field, entries, value_len_max) in maps {
            invalids.check(
                entries.len() <= ENTRIES_MAX,
                field,
                format!("must have at most {ENTRIES_MAX} entries"),
            );
            for (key, value) in entries.iter().take(ENTRIES_MAX) {
                let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
                let key_ok = (1..=KEY_LEN_MAX).contains(&key.len()) && key.bytes().all(legal);
                invalids.check(
                    key_ok,
                    format!("{field}[{key:?}]"),
                    "must have a key of letters, digits, '-', '_', '.' and '/'",
                );
                invalids.check(
                    value.len() <= value_len_max,
                    format!("{field}[{key:?}]"),
                    format!("must have at most {value_len_max} characters"),
                );
            }
        }
    }
}

/// The state of a resource in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not there yet; nothing is wrong.
    #[default]
    Pending,
    /// As wanted.
    Ready,
    /// Needs somebody; the message says what.
    Error,
}

/// What is, as the controller sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ResourceStatus {
    /// The state in one word.
    pub phase: Phase,
    /// The state in a sentence, with the next step when there is one.
    pub message: String,
    /// Details, one per aspect.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// One aspect of the state of a resource, as in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// What it is about, e.g. `Bound`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_transition_time: String,
}
