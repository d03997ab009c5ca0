//! Processes that hold namespaces open. Everything else in the lab lives below them.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Directories of labs are named so, followed by the process id of their maker.
pub(crate) const DIR_PREFIX: &str = "skein-lab-";

/// The first process of the lab. It reads a pipe only we hold: when we are gone, however, it ends what is
/// left, removes the directory and exits, and as it is process 1 the kernel kills whatever escaped. What the
/// hosts wrote, their logs above all, is first copied to the directory `SKEIN_LAB_KEEP` names, if it does.
const CORE_SCRIPT: &str = r#"
trap '' INT HUP
read -r pid _ < /proc/self/stat
echo "$pid"
until cat > /dev/null; do :; done
kill -9 -1
[ -z "$SKEIN_LAB_KEEP" ] || { mkdir -p "$SKEIN_LAB_KEEP" && cp -a "$1" "$SKEIN_LAB_KEEP"; }
rm -rf "$1"
"#;

/// Process 1 of a host. It outlives a `kill -9 -1`, which its `cat` does not, and while it waits for `cat` it
/// reaps what daemons leave. `/proc` is mounted last so that `/proc/self` is still our number outside.
const HOST_SCRIPT: &str = r#"
set -e
trap '' INT HUP
read -r pid _ < /proc/self/stat
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
echo "$pid"
until cat > /dev/null; do :; done
"#;

/// A process whose namespaces outlive the commands run in them.
#[derive(Debug)]
pub(crate) struct Holder {
    // Holding its stdin open is what keeps it alive.
    child: Child,
    pid: u32,
}

impl Holder {
    /// The namespaces of a lab as a whole.
    pub(crate) fn core(dir: &Path) -> Result<Self> {
        let mut command = Command::new("unshare");
        if rootless() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--mount", "--pid", "--fork", "--propagation", "private"]);
        command.args(["sh", "-c", CORE_SCRIPT, "sh"]).arg(dir);
        Self::spawn(command).context(
            "make the namespaces of the lab (as an ordinary user this needs unprivileged user \
             namespaces: sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)",
        )
    }

    /// The namespaces of one host, nested in this holder's.
    pub(crate) fn host(&self, name: &str, dir: &Path) -> Result<Self> {
        let mut command = self.enter(&["--mount", "--pid"]);
        command.args(["unshare", "--net", "--mount", "--pid", "--uts", "--fork"]);
        command.args(["--propagation", "private", "sh", "-c", HOST_SCRIPT, "sh", name]).arg(dir);
        Self::spawn(command).with_context(|| format!("make the namespaces of host {name}"))
    }

    /// A command line that runs what is appended to it inside the given namespaces of this holder.
    pub(crate) fn enter(&self, namespaces: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string()]);
        if rootless() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.args(namespaces);
        command
    }

    /// Runs a shell script in the network of this holder.
    ///
    /// # Errors
    /// With what it printed, when it fails.
    pub(crate) fn network_script(&self, script: &str) -> Result<()> {
        // The mount namespace matters too: it holds the lock file of iptables and the /proc of the host.
        let output = self
            .enter(&["--net", "--mount"])
            .args(["sh", "-ec", script])
            .env("PATH", path())
            .stdin(Stdio::null())
            .output()
            .context("run nsenter (package util-linux)")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {}", stderr.trim());
        Ok(())
    }

    /// Its network namespace, for a thread to enter.
    ///
    /// # Errors
    /// When the holder is gone.
    pub(crate) fn network(&self) -> Result<std::fs::File> {
        let path = format!("/proc/{}/ns/net", self.pid);
        std::fs::File::open(&path).with_context(|| path)
    }

    /// The number of the holder outside of the lab.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    fn spawn(mut command: Command) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;
        // Its own process group: a Ctrl-C is for us, and the lab ends because we do.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped()).env("PATH", path());
        let mut child = command.spawn().context("run unshare or nsenter (package util-linux)")?;
        let mut line = String::new();
        let stdout = child.stdout.take().expect("invariant: stdout was piped");
        BufReader::new(stdout).read_line(&mut line)?;
        let Ok(pid) = line.trim().parse() else {
            let output = child.wait_with_output()?;
            anyhow::bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        };
        Ok(Self { child, pid })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // It has nobody left to report to; an error here means it is gone already.
        let _ = self.child.wait();
    }
}

/// Whether this process must make a user namespace to be allowed anything.
pub(crate) fn rootless() -> bool {
    !rustix::process::geteuid().is_root()
}

/// The search path, with the directories of `ip`, `iptables` and servers that an ordinary user lacks.
pub(crate) fn path() -> String {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
    format!("{path}:/usr/sbin:/sbin")
}

/// Removes directories of labs whose maker was killed together with the first process of its lab.
pub(crate) fn reap_stale() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(DIR_PREFIX));
        let Some((pid, _)) = pid.and_then(|rest| rest.split_once('-')) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            // Somebody else's directory cannot be removed, and is not ours to remove.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
