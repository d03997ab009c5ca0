//! systemd units of a site: controller and router, each restarted by systemd.

use std::{fs, io, path::PathBuf, process::Command};

use crate::paths::Paths;

const CONTROLLER: &str = include_str!("../../../../../deploy/systemd/skein-controller.service");
const ROUTER: &str = include_str!("../../../../../deploy/systemd/skein-router.service");

/// Why units were not installed, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// No place for units of this user.
    #[error("no home directory for user units; set HOME, or use --service none")]
    NoHome,
    /// A unit file cannot be written or removed.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// systemctl is missing or refused.
    #[error("`{command}` failed: {why}; is systemd running here? (--service none does without)")]
    Systemctl {
        /// What was run.
        command: String,
        /// What it said.
        why: String,
    },
}

/// The units of one site.
#[derive(Clone, Debug)]
pub struct Units {
    paths: Paths,
    is_root: bool,
    dir: PathBuf,
}

impl Units {
    /// Units of the system for root, of the user's own manager otherwise.
    ///
    /// # Errors
    /// [`UnitError::NoHome`].
    pub fn of(paths: &Paths) -> Result<Self, UnitError> {
        let is_root = rustix::process::geteuid().is_root();
        let dir = if is_root {
            PathBuf::from("/etc/systemd/system")
        } else {
            let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
            let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
            config.or(home).ok_or(UnitError::NoHome)?.join("systemd/user")
        };
        Ok(Self { paths: paths.clone(), is_root, dir })
    }

    /// Names of the units, controller first.
    #[must_use]
    pub fn names(&self) -> [String; 2] {
        let label = self.paths.label();
        [format!("skein-controller-{label}.service"), format!("skein-router-{label}.service")]
    }

    /// The unit files, controller first.
    #[must_use]
    pub fn render(&self) -> [String; 2] {
        let [controller, _] = self.names();
        let target = if self.is_root { "multi-user.target" } else { "default.target" };
        [CONTROLLER, ROUTER].map(|template| {
            template
                .replace("@NAMESPACE@", self.paths.namespace())
                .replace("@STATE@", &quoted(&self.paths.state().display().to_string()))
                .replace("@RUNTIME@", &quoted(&self.paths.runtime().display().to_string()))
                .replace("@CONTROLLER_UNIT@", &controller)
                .replace("@TARGET@", target)
        })
    }

    /// Writes the units, enables and starts them; the notes say what the user should know.
    ///
    /// # Errors
    /// See [`UnitError`].
    pub fn start(&self) -> Result<Vec<String>, UnitError> {
        fs::create_dir_all(&self.dir)
            .map_err(|source| UnitError::Io { path: self.dir.clone(), source })?;
        let names = self.names();
        for (name, text) in names.iter().zip(self.render()) {
            let path = self.dir.join(name);
            fs::write(&path, text).map_err(|source| UnitError::Io { path, source })?;
        }
        self.systemctl(&["daemon-reload"])?;
        self.systemctl(&["enable", "--now", &names[0], &names[1]])?;
        Ok(self.linger_hint().into_iter().collect())
    }

    /// Stops both, router first so that it can say farewell.
    ///
    /// # Errors
    /// [`UnitError::Systemctl`].
    pub fn stop(&self) -> Result<(), UnitError> {
        if !super::has_systemd() {
            return Ok(());
        }
        let [controller, router] = self.names();
        self.systemctl(&["stop", &router, &controller])
    }

    /// Whether any of the unit files is there.
    #[must_use]
    pub fn are_installed(&self) -> bool {
        self.names().iter().any(|name| self.dir.join(name).exists())
    }

    /// Keeps both from being started at the next boot; what runs goes on.
    ///
    /// # Errors
    /// [`UnitError::Systemctl`].
    pub fn disable(&self) -> Result<(), UnitError> {
        if !super::has_systemd() {
            return Ok(());
        }
        let [controller, router] = self.names();
        self.systemctl(&["disable", &router, &controller])
    }

    /// Stops, disables and removes both, if they are there.
    ///
    /// # Errors
    /// See [`UnitError`].
    pub fn remove(&self) -> Result<(), UnitError> {
        let names = self.names();
        if !self.are_installed() {
            return Ok(());
        }
        // Units that were written where no systemd runs are files and nothing more.
        let has_systemd = super::has_systemd();
        if has_systemd {
            self.systemctl(&["disable", "--now", &names[1], &names[0]])?;
        }
        for name in &names {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(UnitError::Io { path, source });
                }
                _ => {}
            }
        }
        if has_systemd { self.systemctl(&["daemon-reload"]) } else { Ok(()) }
    }

    fn systemctl(&self, arguments: &[&str]) -> Result<(), UnitError> {
        let mut command = Command::new("systemctl");
        if !self.is_root {
            command.arg("--user");
        }
        command.args(arguments);
        let failed = |why: String| UnitError::Systemctl {
            command: format!("systemctl {}", arguments.join(" ")),
            why,
        };
        let output = command.output().map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    /// Units of a user end when the user logs out, unless lingering is on.
    fn linger_hint(&self) -> Option<String> {
        if self.is_root {
            return None;
        }
        let user = std::env::var("USER").ok()?;
        let lingers = PathBuf::from("/var/lib/systemd/linger").join(&user).exists();
        (!lingers).then(|| {
            format!("the site ends when {user} logs out; to keep it running: loginctl enable-linger {user}")
        })
    }
}

/// A word of `ExecStart=` (systemd.service(5)): quoted, with specifiers and variables taken literally.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            '%' => out.push_str("%%"),
            '$' => out.push_str("$$"),
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_complete() {
        let paths = Paths::new("/var/lib/skein/a b".into(), "/run/skein/x".into());
        let units = Units { paths, is_root: true, dir: PathBuf::new() };
        for text in units.render() {
            assert!(!text.contains('@') && text.contains("Restart=always"), "{text}");
            assert!(text.contains("\"/var/lib/skein/a b\"") && text.contains("multi-user.target"));
        }
    }

    #[test]
    #[allow(clippy::print_stderr, reason = "a test that did not run says so")]
    fn systemd_accepts_the_units() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new("/srv/a b%/$x/default".into(), "/run/skein/x".into());
        let units = Units { paths, is_root: true, dir: dir.path().to_owned() };
        let files: Vec<PathBuf> = units.names().iter().map(|name| dir.path().join(name)).collect();
        for (file, text) in files.iter().zip(units.render()) {
            fs::write(file, text).unwrap();
        }
        let mut verify = Command::new("systemd-analyze");
        match verify.arg("verify").args(&files).output() {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let ours = said.lines().filter(|line| line.contains("skein-")).count();
                assert!(output.status.success() && ours == 0, "{said}");
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let is_strict = std::env::var_os("SKEIN_LAB_STRICT").is_some();
                assert!(!is_strict, "cannot run: systemd-analyze is not installed");
                eprintln!("SKIPPED: systemd-analyze is not installed");
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn words_are_taken_literally() {
        assert_eq!(quoted("/a b/%n/$x\"\\"), "\"/a b/%%n/$$x\\\"\\\\\"");
    }
}
