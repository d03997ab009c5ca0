//! Files, standard input and secrets from users.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal as _, Read, Write as _},
    path::Path,
};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::Failure;

/// Longest passphrase in bytes.
const PASSPHRASE_LEN_MAX: usize = 1024;
/// Shortest passphrase in characters: the archive may be attacked at leisure.
const PASSPHRASE_LEN_MIN: usize = 8;

/// Reads a file, or standard input for `-`, of at most `len_max` bytes.
pub(crate) fn read(path: &str, len_max: usize) -> Result<Vec<u8>, Failure> {
    let shown = if path == "-" { "standard input" } else { path };
    let limit = len_max as u64 + 1;
    let mut content = Vec::new();
    let result = if path == "-" {
        io::stdin().lock().take(limit).read_to_end(&mut content)
    } else {
        File::open(path).and_then(|file| {
            // Reading a directory fails with a message nobody understands.
            if file.metadata()?.is_dir() {
                return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
            }
            file.take(limit).read_to_end(&mut content)
        })
    };
    result.map_err(|error| {
        let missing = error.kind() == io::ErrorKind::NotFound;
        let failure = Failure::new(format_args!("cannot read {shown}")).because(error);
        if missing { failure.next("check the path; - reads standard input") } else { failure }
    })?;
    if content.len() > len_max {
        return Err(Failure::new(format_args!("{shown} has more than {len_max} bytes"))
            .because("that is more than anything expected here"));
    }
    Ok(content)
}

/// Writes a secret: mode 0600 from the first byte, complete or not at all. Replaces only with `replace`.
pub(crate) fn write_secret(path: &Path, content: &[u8], replace: bool) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        Failure::new(format_args!("cannot write {}", path.display())).because(error)
    };
    if !replace && fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file()) {
        return Err(Failure::new(format_args!("{} exists already", path.display()))
            .next("name another file, or remove it first"));
    }
    // A device or pipe is written to, not replaced.
    let special = fs::metadata(path).is_ok_and(|meta| !meta.is_file());
    if special {
        let mut file = OpenOptions::new().write(true).open(path).map_err(failed)?;
        return file.write_all(content).map_err(failed);
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    // Temporary files of this crate have mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(|error| {
        // The file that cannot be made has a name of no interest.
        let why = match error.kind() {
            io::ErrorKind::NotFound => "it does not exist".to_owned(),
            other => other.to_string(),
        };
        Failure::new(format_args!("cannot write {}", path.display()))
            .because(format_args!("directory {}: {why}", dir.display()))
    })?;
    file.write_all(content).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    if replace {
        file.persist(path).map_err(|error| failed(error.error))?;
    } else {
        file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Asks for a passphrase: from `file`, else without echo on the terminal, else the first line of standard input.
///
/// # Cancel safety
/// The terminal echoes again when the future is dropped.
pub(crate) async fn passphrase(file: Option<String>, new: bool) -> Result<String, Failure> {
    let text = match file {
        Some(path) => first_line(&blocking(move || read(&path, PASSPHRASE_LEN_MAX)).await?)?,
        None if io::stdin().is_terminal() => {
            let first = prompt("Passphrase: ").await?;
            if new && prompt("Again: ").await? != first {
                return Err(Failure::new("the passphrases differ").next("try again"));
            }
            first
        }
        None => first_line(&blocking(|| read("-", PASSPHRASE_LEN_MAX)).await?)?,
    };
    if new && text.chars().count() < PASSPHRASE_LEN_MIN {
        return Err(Failure::new(format_args!(
            "the passphrase has fewer than {PASSPHRASE_LEN_MIN} characters"
        ))
        .because("whoever finds the file can try passphrases as long as they like"));
    }
    Ok(text)
}

/// Asks a question that is answered with yes or no; without a terminal the answer is no.
pub(crate) async fn confirm(question: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Ok(false);
    }
    write!(io::stderr(), "{question} [y/N] ").map_err(|error| terminal(&error))?;
    let answer = blocking(read_line).await?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Runs `read` where it may block, so that Ctrl-C still ends the program.
pub(crate) async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| Failure::new("reading failed").because(error))?
}

async fn prompt(text: &str) -> Result<String, Failure> {
    write!(io::stderr(), "{text}").map_err(|error| terminal(&error))?;
    let echo_off = EchoOff::start().map_err(|error| terminal(&error))?;
    let line = blocking(read_line).await;
    drop(echo_off);
    // The newline the user typed was not echoed either.
    writeln!(io::stderr()).map_err(|error| terminal(&error))?;
    first_line(line?.as_bytes())
}

fn read_line() -> Result<String, Failure> {
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(|error| terminal(&error))?;
    Ok(line)
}

fn first_line(content: &[u8]) -> Result<String, Failure> {
    let text =
        std::str::from_utf8(content).map_err(|_| Failure::new("the passphrase is not text"))?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(Failure::new("the passphrase is empty"));
    }
    Ok(line.to_owned())
}

fn terminal(error: &io::Error) -> Failure {
    Failure::new("cannot ask on the terminal").because(error)
}

/// Keeps the terminal from showing what is typed.
struct EchoOff {
    before: Termios,
}

impl EchoOff {
    fn start() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self { before })
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        // A terminal that is gone needs no echo.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}
