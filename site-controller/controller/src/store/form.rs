//! What every JSON file looks like.

use std::path::Path;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

use super::StoreError;

/// The form of JSON state written here.
pub(super) const STATE_VERSION: u32 = 1;

/// State, and in which form it is.
#[derive(Serialize, Deserialize)]
struct Stated<T> {
    version: u32,
    state: T,
}

/// State as people can read it; wiped from memory, because some of it is secret.
pub(super) fn json<T: Serialize>(state: &T) -> Zeroizing<Vec<u8>> {
    let stated = Stated { version: STATE_VERSION, state };
    let json = serde_json::to_vec_pretty(&stated);
    Zeroizing::new(json.expect("invariant: state has string keys only"))
}

/// Reads what [`json`] wrote; what cannot be understood is described.
pub(super) fn parse<T: DeserializeOwned>(
    path: &Path,
    bytes: &[u8],
) -> Result<Result<T, String>, StoreError> {
    #[derive(Deserialize)]
    struct Form {
        version: u32,
    }
    match serde_json::from_slice(bytes) {
        Ok(Form { version }) if version > STATE_VERSION => {
            Err(StoreError::Newer { path: path.to_owned(), version })
        }
        Ok(_) => Ok(serde_json::from_slice(bytes)
            .map(|stated: Stated<T>| stated.state)
            .map_err(|error| error.to_string())),
        Err(error) => Ok(Err(error.to_string())),
    }
}
