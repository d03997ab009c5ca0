//! Signed records as they are kept in JSON files.

use data_encoding::BASE64;
use skein_wire::proto::routing::Record;

/// Body and signature, base64.
pub(crate) fn to_text(record: &Record) -> (String, String) {
    (BASE64.encode(&record.body), BASE64.encode(&record.signature))
}

/// The inverse; `None` when it is not one.
pub(crate) fn from_text((body, signature): &(String, String)) -> Option<Record> {
    let body = BASE64.decode(body.as_bytes()).ok().filter(|body| !body.is_empty())?;
    let signature = BASE64.decode(signature.as_bytes()).ok()?;
    Some(Record { body: body.into(), signature: signature.into() })
}
