//! Changes of several resources at once: all or none, also when the machine stops in between.
//!
//! The whole change is written to one file first; from then on it is decided. What a crash interrupts is finished at the next start.

use serde::{Deserialize, Serialize};
use skein_api::{Kind, Resource};

use super::{Store, StoreError, io_error, resource_file_name, resource_yaml};

const JOURNAL: &str = "apply.journal";

/// One step of a change.
#[derive(Clone, Debug)]
pub enum Change {
    /// The resource is to be as given.
    Put(Box<Resource>),
    /// The resource is to be gone.
    Remove(Kind, String),
}

impl Change {
    /// The resource is to be as given.
    #[must_use]
    pub fn put(resource: Resource) -> Self {
        Self::Put(Box::new(resource))
    }
}

/// What the journal holds: file names and contents, so that finishing it needs no understanding.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    steps: Vec<(String, Option<String>)>,
}

impl Store {
    /// Makes all changes, or none.
    ///
    /// # Errors
    /// The file system refuses. Before the journal is written nothing has changed; after that the change stands and is finished at the
    /// next start at the latest.
    pub fn commit(&self, changes: &[Change]) -> Result<(), StoreError> {
        let step = |change: &Change| match change {
            Change::Put(resource) => (
                resource_file_name(resource.kind(), resource.name()),
                Some(resource_yaml(resource)),
            ),
            Change::Remove(kind, name) => (resource_file_name(*kind, name), None),
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

    fn play(&self, journal: &Journal) -> Result<(), StoreError> {
        for (name, content) in &journal.steps {
            self.step(name, content.as_deref())?;
        }
        let path = self.path(JOURNAL);
        self.disk.remove(&path).map_err(|source| io_error("remove", &path, source))
    }

    fn step(&self, name: &str, content: Option<&str>) -> Result<(), StoreError> {
        let path = self.paths.resources_dir().join(name);
        match content {
            Some(content) => self.write(&path, content.as_bytes()),
            None => self.disk.remove(&path).map_err(|source| io_error("remove", &path, source)),
        }
    }
}
