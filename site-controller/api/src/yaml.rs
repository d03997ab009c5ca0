//! YAML and JSON documents in, canonical YAML out.
//!
//! Input may come from anybody: every size is bounded before anything is parsed, and the parser has budgets.

use serde::Deserialize;
use serde_saphyr::{
    DeserializeError, DuplicateKeyPolicy, MergeKeyPolicy, Options, SerializerOptions,
    UserMessageFormatter,
};

use crate::{
    invalid::Invalids,
    manifest::{API_VERSION, Manifest, Spec},
    resource::{Kind, Resource},
};

/// Most bytes of one input: 500 services are 100 kB.
pub const INPUT_LEN_MAX: usize = 8 * 1024 * 1024;
/// Most bytes of one document: the largest sensible resource is a connector of a few kilobytes.
pub const DOCUMENT_LEN_MAX: usize = 1024 * 1024;
/// Most documents of one input.
pub const DOCUMENTS_MAX: usize = 10_000;
/// Nesting; resources need five levels.
const DEPTH_MAX: usize = 32;
/// Aliases of one document; nothing in a resource needs them, some people like them.
const ALIASES_MAX: usize = 100;

/// Why an input is not a list of resources.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The whole input exceeds [`INPUT_LEN_MAX`].
    #[error("the input has {len} bytes, more than the {INPUT_LEN_MAX} allowed; split it")]
    InputTooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The input has more than [`DOCUMENTS_MAX`] documents.
    #[error("the input has more than {DOCUMENTS_MAX} documents; split it")]
    TooManyDocuments,
    /// One document exceeds [`DOCUMENT_LEN_MAX`].
    #[error("line {line}: the document has {len} bytes, more than the {DOCUMENT_LEN_MAX} allowed")]
    DocumentTooLong {
        /// Line on which it begins.
        line: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// Not UTF-8.
    #[error("the input is not UTF-8 text (byte {offset})")]
    Encoding {
        /// First offending byte.
        offset: usize,
    },
    /// Not a document of the kind it says it is: syntax, an unknown field, a wrong type, a missing field.
    #[error("line {line}, column {column}: {what}")]
    Document {
        /// Line in the input.
        line: u64,
        /// Column in the line.
        column: u64,
        /// What is wrong there.
        what: String,
    },
    /// A well-formed resource that breaks rules.
    #[error("line {line}: {kind} {name:?}: {invalids}")]
    Invalid {
        /// Line on which the document begins.
        line: u64,
        /// The kind.
        kind: Kind,
        /// The name it gives itself.
        name: String,
        /// The broken rules.
        invalids: Invalids,
    },
    /// The same kind and name occur twice.
    #[error("line {line}: {kind} {name:?} occurs a second time in the same input")]
    Duplicate {
        /// Line on which the second one begins.
        line: u64,
        /// The kind.
        kind: Kind,
        /// The name.
        name: String,
    },
}

/// Who wrote a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Author {
    /// Somebody who can mend it.
    User,
    /// [`to_yaml`], of this or an earlier version.
    State,
}

/// Parses a stream of YAML documents (JSON is YAML) into checked resources, in their order.
///
/// # Errors
/// The first document that cannot be taken, with its line; nothing is returned of the others.
pub fn parse_documents(input: &[u8]) -> Result<Vec<Resource>, ParseError> {
    parse(input, Author::User)
}

/// As [`parse_documents`], for what a site has kept: where an earlier version was less strict it is put in today's form. Refusing it would
/// take from a site what its owner was once told is in force.
///
/// # Errors
/// As there.
pub fn parse_stored(input: &[u8]) -> Result<Vec<Resource>, ParseError> {
    parse(input, Author::State)
}

fn parse(input: &[u8], author: Author) -> Result<Vec<Resource>, ParseError> {
    if input.len() > INPUT_LEN_MAX {
        return Err(ParseError::InputTooLong { len: input.len() });
    }
    let text = std::str::from_utf8(input)
        .map_err(|error| ParseError::Encoding { offset: error.valid_up_to() })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut resources: Vec<Resource> = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for (document, line) in documents(text) {
        if document.len() > DOCUMENT_LEN_MAX {
            return Err(ParseError::DocumentTooLong { line, len: document.len() });
        }
        if resources.len() == DOCUMENTS_MAX {
            return Err(ParseError::TooManyDocuments);
        }
        let resource = parse_document(document, line, author)?;
        let (kind, name) = (resource.kind(), resource.name().to_owned());
        if !seen.insert((kind, name.clone())) {
            return Err(ParseError::Duplicate { line, kind, name });
        }
        resources.push(resource);
    }
    Ok(resources)
}

/// Parses and checks one resource written by [`Resource::to_json`].
///
/// # Errors
/// What is wrong, with its position.
pub fn parse_json(json: &str) -> Result<Resource, ParseError> {
    if json.len() > DOCUMENT_LEN_MAX {
        return Err(ParseError::DocumentTooLong { line: 1, len: json.len() });
    }
    parse_document(json, 1, Author::User)
}

/// The canonical form: every field that differs from its default, in the order of the types, `---` between documents.
#[must_use]
pub fn to_yaml(resources: &[Resource]) -> String {
    // Typed structures are written in their field order; 1.1 readers must not take `no` or `1_000` for something else.
    let options: SerializerOptions = serde_saphyr::ser_options! {
        empty_as_braces: true,
        prefer_block_scalars: true,
    };
    let mut out = String::new();
    for (index, resource) in resources.iter().enumerate() {
        if index > 0 {
            out.push_str("---\n");
        }
        serde_saphyr::to_fmt_writer_with_options(&mut out, resource, options.clone())
            .expect("invariant: resources are plain mappings of strings and numbers");
        if !out.ends_with('\n') {
            out.push('\n');
        }
    }
    out
}

/// Splits at document markers. YAML forbids `---` at the beginning of a line inside any scalar, so no parser is needed.
fn documents(text: &str) -> impl Iterator<Item = (&str, u64)> {
    let mut starts = vec![(0, 1)];
    let (mut offset, mut line) = (0, 1);
    for content in text.split_inclusive('\n') {
        let marker = content.strip_prefix("---").or_else(|| content.strip_prefix("..."));
        if marker.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n'])) {
            // What follows on the marker's own line belongs to the document.
            starts.push((offset + 3, line));
        }
        offset += content.len();
        line += 1;
    }
    let ends: Vec<usize> =
        starts.iter().skip(1).map(|&(start, _)| start - 3).chain([text.len()]).collect();
    let blank = |document: &str| {
        document.lines().all(|line| {
            let line = line.trim_start();
            line.is_empty() || line.starts_with('#') || line.starts_with("%YAML")
        })
    };
    starts
        .into_iter()
        .zip(ends)
        .map(move |((start, line), end)| (&text[start..end], line))
        .filter(move |(document, _)| !blank(document))
}

/// What must be known of a document before its type is.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
}

fn parse_document(document: &str, line: u64, author: Author) -> Result<Resource, ParseError> {
    let header: Header = typed(document, line)?;
    let refuse = |what: String| ParseError::Document { line, column: 1, what };
    let version = header.api_version.ok_or_else(|| refuse("apiVersion is missing".to_owned()))?;
    if version != API_VERSION {
        return Err(refuse(format!("apiVersion {version:?} is not known here; use {API_VERSION}")));
    }
    let name = header.kind.ok_or_else(|| refuse("kind is missing".to_owned()))?;
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.as_str() == name) else {
        let known = Kind::ALL.map(Kind::as_str).join(", ");
        return Err(refuse(format!("unknown kind {name:?}; kinds are {known}")));
    };
    match kind {
        Kind::Site => checked(document, line, author).map(Resource::Site),
        Kind::Link => checked(document, line, author).map(Resource::Link),
        Kind::AccessGrant => checked(document, line, author).map(Resource::AccessGrant),
        Kind::AccessToken => checked(document, line, author).map(Resource::AccessToken),
        Kind::Listener => checked(document, line, author).map(Resource::Listener),
        Kind::Connector => checked(document, line, author).map(Resource::Connector),
    }
}

fn checked<S: Spec>(document: &str, line: u64, author: Author) -> Result<Manifest<S>, ParseError> {
    let mut manifest: Manifest<S> = typed(document, line)?;
    if author == Author::State {
        manifest.spec.normalise();
    }
    match manifest.validate() {
        Ok(()) => Ok(manifest),
        Err(invalids) => {
            let name = manifest.metadata.name.chars().take(64).collect();
            Err(ParseError::Invalid { line, kind: S::KIND, name, invalids })
        }
    }
}

fn typed<T: for<'de> Deserialize<'de>>(document: &str, line: u64) -> Result<T, ParseError> {
    let mut field = String::new();
    serde_saphyr::with_deserializer_from_str_with_options(document, options(), |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            field = error.path().to_string().trim_end_matches(".?").to_owned();
            error.into_inner()
        })
    })
    .map_err(|error| located(&error, line, &field))
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            flow_nesting_limit: DEPTH_MAX,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_documents: 1,
            max_nodes: 100_000,
            max_merge_keys: ALIASES_MAX,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        strict_booleans: true,
        with_snippet: false,
    }
}

fn located(error: &DeserializeError, first_line: u64, field: &str) -> ParseError {
    let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
    // Locations count from the document, people count from the file.
    let line = first_line - 1 + line.max(1);
    let rendered = error.without_snippet().render_with_formatter(&UserMessageFormatter);
    let what = rendered.lines().next().unwrap_or_default();
    let what = what.split(" at line ").next().unwrap_or(what).trim();
    let what = match what {
        "invalid u32" | "invalid u64" => "must be a whole number",
        "invalid bool" => "must be true or false",
        other => other,
    };
    let what = match field {
        "" | "." => what.to_owned(),
        _ => format!("{field}: {what}"),
    };
    ParseError::Document { line, column: column.max(1), what }
}
