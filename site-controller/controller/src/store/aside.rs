//! Damaged files: moved out of the way, kept, and named until somebody has dealt with them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::{Store, StoreError, io_error};
use crate::clock;

/// Between the name of a damaged file and the time it was set aside.
const ASIDE: &str = ".corrupt-";

/// A damaged file that was moved out of the way, kept for whoever wants to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Where it was.
    pub file: PathBuf,
    /// Where it is.
    pub aside: PathBuf,
    /// What is wrong with it, as far as this process has seen.
    pub why: Option<String>,
}

impl SetAside {
    /// What to do about it: losing a file means something else for each.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        let dir = self.file.parent().and_then(Path::file_name).and_then(|dir| dir.to_str());
        match (dir, self.file.file_name().and_then(|name| name.to_str())) {
            (Some("resources"), _) => {
                "apply the lost resource again or restore the file, then remove the damaged one"
            }
            (Some("grants"), _) => {
                "its token can no longer be used: make another one with `skctl token create`, then remove the damaged file; links made with it stay"
            }
            (Some("endorsed"), _) => {
                "this site no longer endorses that one: make a new token and `skctl link` again, then remove the damaged file"
            }
            (_, Some("learned.pb")) => {
                "nothing needs to be done once a link is up; where none comes up, link again with a new token; then remove the damaged file"
            }
            (_, Some("epochs.json")) => {
                "nothing needs to be done, epochs count on from the time; remove the damaged file"
            }
            (_, Some("endpoints.json")) => {
                "nothing needs to be done, local endpoints are handed out anew, see `skctl service list`; remove the damaged file"
            }
            _ => "see whether the last `skctl apply` is in force, then remove the damaged file",
        }
    }
}

impl fmt::Display for SetAside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was damaged", self.file.display())?;
        if let Some(why) = &self.why {
            write!(f, " ({why})")?;
        }
        write!(f, " and set aside as {}", self.aside.display())
    }
}

impl Store {
    /// Every damaged file that is still there: whoever removes it has dealt with it.
    ///
    /// # Errors
    /// A directory cannot be listed.
    pub fn set_aside_files(&self) -> Result<Vec<SetAside>, StoreError> {
        let state = self.paths.state();
        let trust = self.paths.trust_dir();
        let dirs = [
            state.to_owned(),
            self.paths.resources_dir(),
            state.join("grants"),
            trust.join("endorsed"),
            trust,
        ];
        let mut out = Vec::new();
        for dir in dirs {
            let names = self.disk.list(&dir).map_err(|source| io_error("read", &dir, source))?;
            let found = names.iter().filter_map(|name| Some((name, name.rsplit_once(ASIDE)?.0)));
            out.extend(found.map(|(aside, name)| SetAside {
                file: dir.join(name),
                aside: dir.join(aside),
                why: None,
            }));
        }
        Ok(out)
    }

    /// As [`set_aside_files`](Self::set_aside_files), with what is `known` of them.
    ///
    /// # Errors
    /// As there.
    pub fn still_aside(&self, known: Vec<SetAside>) -> Result<Vec<SetAside>, StoreError> {
        let mut found = self.set_aside_files()?;
        for one in &mut found {
            let same = known.iter().find(|known| known.aside == one.aside);
            one.why = same.and_then(|known| known.why.clone());
        }
        Ok(found)
    }

    /// Reads a file the site can do without. One that is far too long is damaged like any other.
    pub(super) fn read_or_set_aside(
        &self,
        path: &Path,
        problems: &mut Vec<SetAside>,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        match self.disk.read(path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.set_aside(path, &error.to_string(), problems)?;
                Ok(None)
            }
            read => read.map_err(|source| io_error("read", path, source)),
        }
    }

    /// Moves a damaged file out of the way, keeping it for whoever wants to look.
    pub(super) fn set_aside(
        &self,
        path: &Path,
        why: &str,
        problems: &mut Vec<SetAside>,
    ) -> Result<(), StoreError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("file");
        let aside = path.with_file_name(format!("{name}{ASIDE}{}", clock::unix_s()));
        self.disk.rename(path, &aside).map_err(|source| io_error("set aside", path, source))?;
        tracing::error!(file = %path.display(), aside = %aside.display(), why, "state file damaged");
        problems.push(SetAside { file: path.to_owned(), aside, why: Some(why.to_owned()) });
        Ok(())
    }
}
