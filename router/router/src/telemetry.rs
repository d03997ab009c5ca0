//! Logs: one subscriber per process, human or JSON, with the spans of links and flows.
//!
//! The access log (target [`ACCESS`]) is part of the product, not of debugging: it stays on at INFO whatever level was asked for.

use tracing::{Subscriber, level_filters::LevelFilter};
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

/// Installs the process's subscriber; a second call in one process changes nothing, so routers embedded in other programs keep theirs.
pub(crate) fn install(format: LogFormat, level: &str) {
    let (filter, refused) = filter(level);
    let installed = tracing_subscriber::registry()
        .with(layer(format, std::io::stderr).with_filter(filter))
        .try_init();
    if installed.is_ok()
        && let Some(error) = refused
    {
        tracing::warn!(%error, level, "the log level is not understood; using info");
    }
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
    fn a_wrong_level_falls_back() {
        assert!(filter("skein=verbose=1").1.is_some());
        assert!(filter("debug").1.is_none());
    }
}
