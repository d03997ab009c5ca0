//! `skctl logs`

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use skein_controller::Paths;

use crate::{
    args::Global,
    client, clock,
    error::Failure,
    host::{self, LogSource},
    output,
};

/// How often a followed file is looked at.
const POLL: Duration = Duration::from_millis(250);
/// Most lines shown at once; they are held in memory.
const LINES_MAX: u32 = 100_000;

/// Shows what controller and router log
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  skctl logs\n  skctl logs -f --router\n  skctl logs --lines 500 --controller"
)]
pub(crate) struct Logs {
    /// Goes on showing what comes
    #[arg(short, long)]
    follow: bool,
    /// How many lines of each process
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=i64::from(LINES_MAX)))]
    lines: u32,
    /// Only the router's
    #[arg(long, conflicts_with = "controller")]
    router: bool,
    /// Only the controller's
    #[arg(long)]
    controller: bool,
}

pub(crate) async fn run(global: &Global, args: Logs) -> Result<(), Failure> {
    let paths = client::paths(global)?;
    if !paths.has_site() {
        return Err(Failure::new(format_args!(
            "there is no site in namespace {:?}",
            global.namespace
        ))
        .next("create one with `skctl init`"));
    }
    let wanted = |name: &str| match name {
        "router" => !args.controller,
        _ => !args.router,
    };
    match host::logs(&paths)? {
        LogSource::Journal(units) => {
            let units = units.into_iter().filter(|(name, _)| wanted(name)).map(|(_, unit)| unit);
            host::journal(units.collect(), args.lines, args.follow).await
        }
        LogSource::Files(files) => {
            let files: Vec<_> = files.into_iter().filter(|(name, _)| wanted(name)).collect();
            show(&files, args.lines, args.follow).await
        }
    }
}

async fn show(files: &[(&'static str, PathBuf)], lines: u32, follow: bool) -> Result<(), Failure> {
    let mut tails = Vec::new();
    for (name, path) in files {
        let label = if files.len() > 1 { format!("{name}: ") } else { String::new() };
        let mut tail = Tail::open(label, path.clone());
        output::print(&tail.last(lines as usize)?)?;
        tails.push(tail);
    }
    if !follow {
        return Ok(());
    }
    loop {
        clock::sleep(POLL).await;
        for tail in &mut tails {
            output::print(&tail.more()?)?;
        }
    }
}

/// A log file that grows and is replaced when it has grown enough.
struct Tail {
    label: String,
    path: PathBuf,
    file: Option<BufReader<File>>,
    inode: u64,
    partial: String,
}

impl Tail {
    fn open(label: String, path: PathBuf) -> Self {
        Self { label, path, file: None, inode: 0, partial: String::new() }
    }

    fn last(&mut self, lines: usize) -> Result<String, Failure> {
        self.reopen()?;
        let all = self.read()?;
        let mut kept: VecDeque<&str> = VecDeque::with_capacity(lines.min(1_024));
        for line in all.lines() {
            if kept.len() == lines {
                kept.pop_front();
            }
            if lines > 0 {
                kept.push_back(line);
            }
        }
        Ok(kept.into_iter().map(|line| line.to_owned() + "\n").collect())
    }

    fn more(&mut self) -> Result<String, Failure> {
        let mut text = self.read()?;
        if self.reopen()? {
            text += &self.read()?;
        }
        Ok(text)
    }

    /// Opens the file if it appeared or was replaced; true when it did.
    fn reopen(&mut self) -> Result<bool, Failure> {
        let Ok(meta) = self.path.metadata() else { return Ok(false) };
        let truncated = match &mut self.file {
            Some(file) => {
                file.stream_position().map_err(|error| unreadable(&self.path, &error))? > meta.len()
            }
            None => true,
        };
        if meta.ino() == self.inode && !truncated {
            return Ok(false);
        }
        let file = File::open(&self.path).map_err(|error| unreadable(&self.path, &error))?;
        self.inode = meta.ino();
        self.file = Some(BufReader::new(file));
        Ok(true)
    }

    /// Complete new lines, each with the label.
    fn read(&mut self) -> Result<String, Failure> {
        let Some(file) = &mut self.file else { return Ok(String::new()) };
        let mut out = String::new();
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = file.read_until(b'\n', &mut line);
            if read.map_err(|error| unreadable(&self.path, &error))? == 0 {
                return Ok(out);
            }
            self.partial += &String::from_utf8_lossy(&line);
            if self.partial.ends_with('\n') {
                out += &self.label;
                out += &std::mem::take(&mut self.partial);
            }
        }
    }
}

/// The last bytes of a log file, for a dump.
pub(crate) fn tail_bytes(path: &Path, len_max: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(len_max)))?;
    let mut bytes = Vec::new();
    file.take(len_max).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The log files of a site without a service manager.
pub(crate) fn files(paths: &Paths) -> Vec<(&'static str, PathBuf)> {
    ["controller", "router"]
        .into_iter()
        .map(|name| (name, paths.logs_dir().join(format!("{name}.log"))))
        .collect()
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format_args!("cannot read {}", path.display())).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn follows_growth_and_replacement() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let mut tail = Tail::open("a: ".into(), path.clone());
        assert_eq!(tail.last(10).unwrap(), "");
        std::fs::write(&path, "1\n2\n3").unwrap();
        assert_eq!(tail.last(1).unwrap(), "a: 2\n");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"3\n").unwrap();
        assert_eq!(tail.more().unwrap(), "a: 33\n");
        assert_eq!(tail.more().unwrap(), "");
        std::fs::rename(&path, dir.path().join("a.log.1")).unwrap();
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(tail.more().unwrap(), "a: new\n");
    }
}
