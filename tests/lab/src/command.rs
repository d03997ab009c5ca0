//! Running programs on a host.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::clock::{Deadline, eventually};
use crate::host::Host;
use crate::namespace;

/// How long a command may take unless told otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// A program to run on a host. Its output goes to files under the host's `log/`, so that daemons it
/// leaves behind keep nobody waiting.
#[derive(Debug)]
pub struct Command {
    host: Host,
    program: OsString,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    user: Option<String>,
    stdin: Option<PathBuf>,
    timeout: Duration,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    // Keeps the lab alive as long as something runs in it.
    _host: Host,
    child: Child,
    pid: Pid,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Command {
    pub(crate) fn new(host: Host, program: &OsStr) -> Self {
        let dir = host.dir();
        let envs = [
            ("PATH", OsString::from(namespace::path())),
            ("HOME", dir.into()),
            ("TMPDIR", dir.join("tmp").into()),
            ("SKEIN_HOME", dir.join("skein").into()),
            ("SKEIN_LAB", host.shared.lab.dir.path().into()),
            ("LC_ALL", "C.UTF-8".into()),
        ];
        Self {
            program: program.to_owned(),
            args: Vec::new(),
            envs: envs.map(|(name, value)| (name.into(), value)).into(),
            user: None,
            stdin: None,
            timeout: DEFAULT_TIMEOUT,
            host,
        }
    }

    /// Appends one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment, which is otherwise minimal.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it as another user of the machine, which a rootless lab cannot.
    #[must_use]
    pub fn user(mut self, name: &str) -> Self {
        self.user = Some(name.to_owned());
        self
    }

    /// Feeds it a file instead of nothing.
    #[must_use]
    pub fn stdin(mut self, path: impl AsRef<Path>) -> Self {
        self.stdin = Some(path.as_ref().to_owned());
        self
    }

    /// How long [`Command::run`] and [`Command::check`] wait; 60 s unless told.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started, or is killed at its timeout. A non-zero exit is no error here.
    pub fn run(self) -> Result<Output> {
        let (timeout, what) = (self.timeout, self.describe());
        let mut process = self.spawn()?;
        if process.wait(timeout)?.is_none() {
            let stderr = process.stderr();
            bail!("{what}: no end after {timeout:?}; stderr: {}", stderr.trim());
        }
        process.output()
    }

    /// Runs it to its end, which must be exit code 0.
    ///
    /// # Errors
    /// As [`Command::run`], or with its output when it fails.
    pub fn check(self) -> Result<Output> {
        let what = self.describe();
        let output = self.run()?;
        ensure!(output.code == Some(0), "{what}: {output}");
        Ok(output)
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(self) -> Result<Process> {
        let what = self.describe();
        let number = self.host.shared.lab.runs.fetch_add(1, Ordering::Relaxed);
        let name = Path::new(&self.program).file_name().unwrap_or_default().to_string_lossy();
        let base = self.host.dir().join("log").join(format!("{number:04}-{name}"));
        let (stdout, stderr) = (base.with_extension("out"), base.with_extension("err"));
        let mut command = self.host.shared.holder.enter(&["--net", "--mount", "--pid", "--uts"]);
        command.arg("--").arg("env").arg("-C").arg(self.host.dir());
        if let Some(user) = &self.user {
            command.args(["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]);
        }
        command.arg(&self.program).args(&self.args).env_clear().envs(self.envs);
        command.stdin(match &self.stdin {
            Some(path) => {
                File::open(path).with_context(|| format!("open {}", path.display()))?.into()
            }
            None => Stdio::null(),
        });
        command.stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let mut child = command.spawn().with_context(|| format!("start {what}"))?;
        let pid = pid_inside(&mut child)?;
        Ok(Process { _host: self.host, child, pid, stdout, stderr })
    }

    fn describe(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args);
        let line: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
        format!("{}: {}", self.host.name(), line.join(" "))
    }
}

impl Process {
    /// The exit status, or nothing if it still runs after `timeout`.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Deadline::after(timeout);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if deadline.passed() {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end and takes its output.
    ///
    /// # Errors
    /// When it has not ended after `timeout`.
    pub fn finish(mut self, timeout: Duration) -> Result<Output> {
        ensure!(self.wait(timeout)?.is_some(), "still runs after {timeout:?}: {}", self.stderr());
        self.output()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// What it has complained about so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Errors
    /// When it has not after `timeout`.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<()> {
        eventually(text, timeout, || Ok(self.stdout().contains(text)))
            .with_context(|| self.stderr())?;
        Ok(())
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn kill9(&self) -> Result<()> {
        kill_process(self.pid, Signal::KILL)?;
        self.wake_nsenter()
    }

    /// SIGTERM.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn terminate(&self) -> Result<()> {
        Ok(kill_process(self.pid, Signal::TERM)?)
    }

    /// SIGINT, as Ctrl-C does.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn interrupt(&self) -> Result<()> {
        Ok(kill_process(self.pid, Signal::INT)?)
    }

    /// SIGSTOP: it stays, and does nothing.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn freeze(&self) -> Result<()> {
        Ok(kill_process(self.pid, Signal::STOP)?)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn thaw(&self) -> Result<()> {
        kill_process(self.pid, Signal::CONT)?;
        self.wake_nsenter()
    }

    /// `nsenter` stops itself when its child stops, and then sees no end of the child either.
    fn wake_nsenter(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("number 0")?;
        Ok(kill_process(pid, Signal::CONT)?)
    }

    fn output(&mut self) -> Result<Output> {
        let status = self.child.wait()?;
        Ok(Output { code: status.code(), stdout: self.stdout(), stderr: self.stderr() })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It may end by itself at this very moment; either way there is something to wait for.
            let _ = self.kill9();
            let _ = self.child.wait();
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.code {
            Some(code) => write!(f, "exit code {code}")?,
            None => write!(f, "ended by a signal")?,
        }
        write!(f, "\nstdout: {}\nstderr: {}", self.stdout.trim(), self.stderr.trim())
    }
}

/// `nsenter` forks to enter a process namespace and does not pass signals on, so they must go to its
/// only child.
fn pid_inside(child: &mut Child) -> Result<Pid> {
    let parent = child.id();
    let mut found = None;
    eventually("nsenter has entered", Duration::from_secs(10), || {
        found = child_of(parent);
        Ok(found.is_some() || child.try_wait()?.is_some())
    })?;
    let own = Pid::from_raw(i32::try_from(parent)?).context("a process has the number 0")?;
    Ok(found.unwrap_or(own))
}

fn child_of(parent: u32) -> Option<Pid> {
    let list = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    Pid::from_raw(list.split_whitespace().next()?.parse().ok()?)
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
