//! Logs: one subscriber per process, human or JSON, with the spans of links and flows.
//!
//! The access log (target [`ACCESS`]) is part of the product, not of debugging: it stays on at INFO whatever level was asked for.
//!
//! Lines are written by a thread of their own: whoever reads them may be slow, and the data thread must not wait for a disk.

use parking_lot::Mutex;
use rustix::event::{self, PollFd, PollFlags, Timespec};
use std::sync::OnceLock;
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer as _, fmt, layer::SubscriberExt as _, registry::LookupSpan,
    util::SubscriberInitExt as _,
};

/// Target of the one line per finished flow.
pub(crate) const ACCESS: &str = "skein::access";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// Lines that wait to be written: a second of access log at 8,000 flows, about 3 MiB. More are dropped and counted.
const LINES_QUEUED_MAX: usize = 8_192;

/// Whoever reads the log gets so long to make room for the last line.
const LAST_LINE_TIMEOUT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// What a pipe that is ready takes without making the writer wait.
const WRITE_LEN_MAX: usize = 4_096;

static FORMAT: OnceLock<LogFormat> = OnceLock::new();
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();
/// Ends the thread that writes.
static WRITER: Mutex<Option<WorkerGuard>> = Mutex::new(None);

/// Lines that were not written because whoever reads them is too slow.
pub(crate) fn lines_dropped() -> u64 {
    let dropped = DROPPED.get().map_or(0, ErrorCounter::dropped_lines);
    u64::try_from(dropped).unwrap_or(u64::MAX)
}

/// Installs the process's subscriber; a second call in one process changes nothing, so routers embedded in other programs keep theirs.
pub(crate) fn install(format: LogFormat, level: &str) {
    let (filter, refused) = filter(level);
    let (writer, guard) = queued(std::io::stderr());
    let dropped = writer.error_counter();
    let subscriber = tracing_subscriber::registry().with(layer(format, writer).with_filter(filter));
    if subscriber.try_init().is_err() {
        return;
    }
    FORMAT.get_or_init(|| format);
    DROPPED.get_or_init(|| dropped);
    *WRITER.lock() = Some(guard);
    if let Some(error) = refused {
        tracing::warn!(%error, level, "the log level is not understood; using info");
    }
}

/// Writes the lines that are queued, unless nobody takes them, and no more after them: the process ends.
pub(crate) fn finish() {
    drop(WRITER.lock().take());
}

/// Writes an error as the last line of this process: past the queue and the lock of standard error, which the thread that writes may hold
/// while nobody reads.
pub(crate) fn write_now(message: &str, fields: &[(&str, &str)]) {
    let line = last_line(FORMAT.get().copied().unwrap_or_default(), message, fields);
    let (stderr, mut rest) = (rustix::stdio::stderr(), line.as_bytes());
    while !rest.is_empty() {
        let mut asked = [PollFd::new(&stderr, PollFlags::OUT)];
        if !event::poll(&mut asked, Some(&LAST_LINE_TIMEOUT)).is_ok_and(|ready| ready > 0) {
            return;
        }
        let Ok(len) = rustix::io::write(stderr, &rest[..rest.len().min(WRITE_LEN_MAX)]) else {
            return;
        };
        rest = &rest[len..];
    }
}

fn last_line(format: LogFormat, message: &str, fields: &[(&str, &str)]) -> String {
    match format {
        LogFormat::Human => {
            let fields: String =
                fields.iter().map(|(key, value)| format!(" {key}={value}")).collect();
            format!("ERROR {message}{fields}\n")
        }
        LogFormat::Json => {
            let known = [("level", "ERROR"), ("message", message)];
            let fields = known.iter().chain(fields);
            let line: serde_json::Map<_, _> =
                fields.map(|&(key, value)| (key.to_owned(), value.into())).collect();
            format!("{}\n", serde_json::Value::from(line))
        }
    }
}

fn queued(writer: impl std::io::Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LINES_QUEUED_MAX)
        .thread_name("log")
        .finish(writer)
}

fn filter(level: &str) -> (EnvFilter, Option<tracing_subscriber::filter::ParseError>) {
    let access = || format!("{ACCESS}=info").parse().expect("invariant: a literal directive");
    let builder = || EnvFilter::builder().with_default_directive(LevelFilter::INFO.into());
    match builder().parse(level) {
        Ok(filter) => (filter.add_directive(access()), None),
        Err(error) => (builder().parse_lossy("info").add_directive(access()), Some(error)),
    }
}

fn layer<S, W>(format: LogFormat, writer: W) -> Box<dyn tracing_subscriber::Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> fmt::MakeWriter<'w> + Send + Sync + 'static,
{
    match format {
        LogFormat::Human => fmt::layer().with_writer(writer).with_ansi(false).boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_writer(writer)
            .boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::{io, sync::Arc};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, level: &str, work: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::registry()
            .with(layer(format, move || writer.clone()).with_filter(filter(level).0));
        tracing::subscriber::with_default(subscriber, work);
        let bytes = sink.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_access_log_survives_a_quieter_level() {
        let text = logged(LogFormat::Json, "error", || {
            tracing::info!(target: ACCESS, address = "backend", "flow ended");
            tracing::info!("something else");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(line["address"], "backend");
        assert_eq!(line["target"], ACCESS);
    }

    #[test]
    fn json_lines_carry_the_span() {
        let text = logged(LogFormat::Json, "info", || {
            let _entered = tracing::info_span!("link", name = "hub").entered();
            tracing::info!("up");
        });
        let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(line["span"]["name"], "link", "{text}");
    }

    #[test]
    fn the_last_line_looks_like_the_others() {
        let fields = [("reason", "\"why\"")];
        assert_eq!(
            last_line(LogFormat::Human, "the end", &fields),
            "ERROR the end reason=\"why\"\n"
        );
        let line: serde_json::Value =
            serde_json::from_str(&last_line(LogFormat::Json, "the end", &fields)).unwrap();
        assert_eq!((&line["message"], &line["reason"]), (&"the end".into(), &"\"why\"".into()));
    }

    #[test]
    fn a_wrong_level_falls_back() {
        assert!(filter("skein=verbose=1").1.is_some());
        assert!(filter("debug").1.is_none());
    }

    #[test]
    fn a_reader_that_stops_holds_nobody_up() {
        /// Blocks until the test lets go.
        struct Stalled(std::sync::mpsc::Receiver<()>);
        impl io::Write for Stalled {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                // Fails once the test has let go.
                let _ = self.0.recv();
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (let_go, stalled) = std::sync::mpsc::channel();
        let (writer, _guard) = queued(Stalled(stalled));
        let dropped = writer.error_counter();
        let subscriber = tracing_subscriber::registry().with(layer(LogFormat::Human, writer));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..2 * LINES_QUEUED_MAX {
                tracing::info!("flow ended");
            }
        });
        // One may be in the hands of the writer.
        assert!(dropped.dropped_lines() >= LINES_QUEUED_MAX - 1);
        drop(let_go);
    }
}
