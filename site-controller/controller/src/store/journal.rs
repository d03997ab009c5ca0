//! Changes of several resources at once: all or none, also when the machine stops in between.
//!
//! The whole change is written to one file first; from then on it is decided. What a crash interrupts is finished at the next start.

use serde::{Deserialize, Serialize};
use skein_api::{Kind, Resource};
use skein_proxy::Credentials;
use skein_site_core::{Endorsed, Grant};

use super::{Store, StoreError, io_error, json, proxy, resource_file_name, resource_yaml};

/// From this many files on, one sync of the file system is less work than two for each file.
const SYNCED_TOGETHER_MIN: usize = 8;
const JOURNAL: &str = "apply.journal";

/// One step of a change.
#[derive(Clone, Debug)]
pub enum Change {
    /// The resource is to be as given.
    Put(Box<Resource>),
    /// The resource is to be gone.
    Remove(Kind, String),
    /// The grant is to be as given.
    PutGrant(Box<Grant>),
    /// The grant of this name is to be gone.
    RemoveGrant(String),
    /// What this site says of another is to be as given.
    PutEndorsed(Box<Endorsed>),
    /// What this site says of another, given by its id, is to be gone.
    RemoveEndorsed(String),
    /// The site's own file of its proxy's credentials is to have these.
    PutCredentials(Credentials),
    /// It is to be gone.
    RemoveCredentials,
}

impl Change {
    /// The resource is to be as given.
    #[must_use]
    pub fn put(resource: Resource) -> Self {
        Self::Put(Box::new(resource))
    }
}

/// What the journal holds: files below the state directory and their contents, so that finishing it needs no understanding.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    steps: Vec<(String, Option<String>)>,
}

impl Store {
    /// Makes all changes, or none. Whatever a journal may name is changed this way only: a file that was written past a journal that waits
    /// to be finished would be undone by it.
    ///
    /// # Errors
    /// The file system refuses. Before the journal is written nothing has changed; after that the change stands and is finished at the
    /// next start at the latest.
    pub fn commit(&self, changes: &[Change]) -> Result<(), StoreError> {
        let file = |kind: Kind, name: &str| format!("resources/{}", resource_file_name(kind, name));
        let step = |change: &Change| match change {
            Change::Put(resource) => {
                (file(resource.kind(), resource.name()), Some(resource_yaml(resource)))
            }
            Change::Remove(kind, name) => (file(*kind, name), None),
            Change::PutGrant(grant) => (grant_file(&grant.name), Some(json_text(&**grant))),
            Change::RemoveGrant(name) => (grant_file(name), None),
            Change::PutEndorsed(endorsed) => {
                (endorsed_file(&endorsed.site), Some(json_text(&**endorsed)))
            }
            Change::RemoveEndorsed(site) => (endorsed_file(site), None),
            Change::PutCredentials(credentials) => {
                (proxy::FILE.to_owned(), Some(proxy::text(credentials).to_string()))
            }
            Change::RemoveCredentials => (proxy::FILE.to_owned(), None),
        };
        // What could not be finished earlier comes first: its journal is about to be replaced.
        self.finish_journal(&mut Vec::new())?;
        let journal = Journal { steps: changes.iter().map(step).collect() };
        match journal.steps.as_slice() {
            [] => Ok(()),
            // A single file is replaced atomically without help.
            [(name, content)] => self.step(name, content.as_deref()),
            _ => {
                self.save_json(JOURNAL, &journal)?;
                if let Err(error) = self.play(&journal) {
                    tracing::error!(%error, "a change is decided but not finished; the next start finishes it");
                }
                Ok(())
            }
        }
    }

    /// Finishes what a crash interrupted.
    pub(super) fn finish_journal(
        &self,
        problems: &mut Vec<super::SetAside>,
    ) -> Result<(), StoreError> {
        let journal: Option<Journal> = self.optional(JOURNAL, problems)?;
        match journal {
            Some(journal) => self.play(&journal),
            None => Ok(()),
        }
    }

    /// Makes the steps. Making them again changes nothing, so the journal goes last.
    fn play(&self, journal: &Journal) -> Result<(), StoreError> {
        if journal.steps.len() < SYNCED_TOGETHER_MIN {
            for (name, content) in &journal.steps {
                self.step(name, content.as_deref())?;
            }
        } else {
            for (name, content) in &journal.steps {
                let path = self.path(name);
                self.disk
                    .put_unsynced(&path, content.as_deref().map(str::as_bytes))
                    .map_err(|source| io_error("write", &path, source))?;
            }
            let dir = self.paths.state();
            self.disk.sync(dir).map_err(|source| io_error("write", dir, source))?;
        }
        let path = self.path(JOURNAL);
        self.disk.remove(&path).map_err(|source| io_error("remove", &path, source))
    }

    fn step(&self, name: &str, content: Option<&str>) -> Result<(), StoreError> {
        let path = self.path(name);
        match content {
            Some(content) => self.write(&path, content.as_bytes()),
            None => self.disk.remove(&path).map_err(|source| io_error("remove", &path, source)),
        }
    }
}

fn grant_file(name: &str) -> String {
    format!("grants/{name}.json")
}

fn endorsed_file(site: &str) -> String {
    format!("trust/endorsed/{site}.json")
}

fn json_text<T: Serialize>(state: &T) -> String {
    String::from_utf8(json(state).to_vec()).expect("invariant: JSON is UTF-8")
}
