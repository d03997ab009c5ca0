//! Every metric of the router. The table below is also the source of `docs/metrics.md`.
//!
//! Nothing is kept here: a scrape reads the counters that the parts keep anyway. Label values come from closed sets or from the site's own
//! links, so their number is bounded by configuration.

mod server;

pub(crate) use server::serve;

use crate::{
    data::DataPlane,
    flows::{DatagramDrop, Edge, Outcome, Way},
};
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};
use skein_wire::proto::control::link_status::LinkState;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::runtime::Handle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// One metric; the name is without the unit and `_total`, which the encoder appends.
#[derive(Debug)]
struct Definition {
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
}

const fn counter(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Definition {
    Definition { name, kind: Kind::Counter, unit, labels, help }
}

const fn gauge(
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Definition {
    Definition { name, kind: Kind::Gauge, unit, labels, help }
}

const LINK: &[&str] = &["link", "peer"];
const LINK_CARRIER: &[&str] = &["link", "peer", "carrier"];

const DEFINITIONS: &[Definition] = &[
    gauge("skein_build_info", "", &["version"], "1, labelled with the version"),
    gauge("skein_controller_attached", "", &[], "1 while attached to the controller"),
    gauge("skein_link_up", "", LINK_CARRIER, "1 while the link is up, over which carrier"),
    gauge("skein_link_rtt", "seconds", LINK, "Smoothed round-trip time to the neighbour"),
    counter("skein_link_sent", "bytes", LINK, "Sent over the link, frame headers included"),
    counter("skein_link_received", "bytes", LINK, "Received over the link, frame headers included"),
    counter("skein_link_probes_lost", "", &[], "Probes unanswered for an interval, all links"),
    counter("skein_frames", "", &["action"], "Frames by what was done with them"),
    counter(
        "skein_frames_forwarded",
        "bytes",
        &[],
        "Frames passed on for others, headers included",
    ),
    counter("skein_frames_dropped", "", &["reason"], "Frames dropped, by reason"),
    counter("skein_packets_fragmented", "", &[], "End-to-end packets split for a narrow path"),
    counter("skein_packets_reassembled", "", &[], "End-to-end packets put together again"),
    counter("skein_path_kicks", "", &[], "Packets replayed at once on a new path"),
    counter(
        "skein_connections_refused",
        "",
        &[],
        "Connections to the site's port that were refused",
    ),
    gauge("skein_sessions", "", &[], "Sessions open, in both directions"),
    counter("skein_sessions_opened", "", &[], "Sessions established, in both directions"),
    counter("skein_sessions_failed", "", &[], "Sessions that could not be established"),
    counter(
        "skein_session_violations",
        "",
        &[],
        "Sessions closed because the peer broke the protocol",
    ),
    gauge("skein_flows_active", "", &[], "Flows open"),
    counter("skein_flows_opened", "", &[], "Flows begun at this router, as ingress or egress"),
    counter("skein_flows", "", &["edge", "outcome"], "Flows ended, by edge and by how they ended"),
    counter("skein_flow_retries", "", &[], "Flows tried at a further candidate"),
    counter("skein_flow_sent", "bytes", &[], "From clients towards targets, in flows that ended"),
    counter(
        "skein_flow_received",
        "bytes",
        &[],
        "From targets towards clients, in flows that ended",
    ),
    gauge("skein_associations", "", &[], "UDP associations open, which are among the flows"),
    counter(
        "skein_datagrams_sent",
        "",
        &["way"],
        "Datagrams handed to sessions, by how they travel",
    ),
    counter(
        "skein_datagrams_dropped",
        "",
        &["reason"],
        "Datagrams of UDP services dropped, by reason",
    ),
    gauge(
        "skein_memory_used",
        "bytes",
        &[],
        "Flow buffers promised to peers, send windows of sessions that write, 96 KiB per session and 800 KiB more per session of UDP services",
    ),
    gauge("skein_memory_ceiling", "bytes", &[], "Ceiling of that; at it new flows are refused"),
    gauge("skein_lsdb_records", "", &[], "Records in the link-state database"),
    gauge("skein_routes", "", &[], "Routers reachable"),
    gauge("skein_addresses", "", &[], "Addresses with a reachable provider"),
    gauge("skein_sites_trusted", "", &[], "Sites trusted, this one included"),
    counter("skein_fib_publications", "", &[], "Forwarding snapshots published"),
    gauge("skein_lsdb_size", "bytes", &[], "Memory of the link-state database, roughly"),
    counter("skein_routing_runs", "", &["task"], "Runs of the routing engine, by what was due"),
    counter("skein_routing_duration", "seconds", &["task"], "Time spent in the routing engine"),
    counter(
        "skein_log_lines_dropped",
        "",
        &[],
        "Log lines dropped because nobody took them in time",
    ),
    gauge("skein_tasks", "", &["runtime"], "Tasks alive"),
];

/// What the control task knows and the data plane does not.
#[derive(Debug, Default)]
pub(crate) struct RoutingGauges {
    pub(crate) attached: AtomicU64,
    pub(crate) lsdb_records: AtomicU64,
    pub(crate) routes: AtomicU64,
    pub(crate) addresses: AtomicU64,
    pub(crate) sites_trusted: AtomicU64,
    pub(crate) fib_publications: AtomicU64,
    pub(crate) lsdb_bytes: AtomicU64,
    /// Runs of the engine and the time they took, by the reason it gave for being called; reasons are literals.
    runs: Mutex<BTreeMap<&'static str, (u64, Duration)>>,
}

impl RoutingGauges {
    /// Counts a run of the engine.
    pub(crate) fn ran(&self, task: &'static str, took: Duration) {
        let mut runs = self.runs.lock();
        let (count, duration) = runs.entry(task).or_default();
        *count += 1;
        *duration += took;
    }
}

/// Where the numbers come from.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) data: DataPlane,
    pub(crate) routing: Arc<RoutingGauges>,
    pub(crate) data_runtime: Handle,
    pub(crate) control_runtime: Handle,
}

struct Sample {
    name: &'static str,
    labels: Vec<(&'static str, String)>,
    value: f64,
}

/// The metrics page, in OpenMetrics text.
#[derive(Debug)]
pub(crate) struct Page(Registry);

impl Page {
    pub(crate) fn new(sources: Sources) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(sources));
        Self(registry)
    }

    /// # Errors
    /// Never with a `String` behind; the encoder's signature allows it.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut page = String::new();
        text::encode(&mut page, &self.0)?;
        Ok(page)
    }
}

impl Collector for Sources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let samples = self.samples();
        for definition in DEFINITIONS {
            let (unit, kind) = (definition.unit(), definition.metric_type());
            let mut metric =
                encoder.encode_descriptor(definition.name, definition.help, unit.as_ref(), kind)?;
            for sample in samples.iter().filter(|sample| sample.name == definition.name) {
                let labels = sample.labels.as_slice();
                debug_assert!(labels.iter().map(|(label, _)| label).eq(definition.labels));
                let mut family = metric.encode_family(&labels)?;
                match definition.kind {
                    Kind::Counter => {
                        family.encode_counter::<NoLabelSet, _, u64>(&sample.value, None)?;
                    }
                    Kind::Gauge => family.encode_gauge(&sample.value)?,
                }
            }
        }
        Ok(())
    }
}

impl Definition {
    fn unit(&self) -> Option<Unit> {
        match self.unit {
            "" => None,
            "bytes" => Some(Unit::Bytes),
            "seconds" => Some(Unit::Seconds),
            other => Some(Unit::Other(other.into())),
        }
    }

    fn metric_type(&self) -> MetricType {
        match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        }
    }
}

impl Sources {
    fn samples(&self) -> Vec<Sample> {
        let mut samples = Samples::default();
        self.links(&mut samples);
        self.frames(&mut samples);
        self.flows(&mut samples);
        self.routing(&mut samples);
        samples.0
    }

    fn links(&self, samples: &mut Samples) {
        for link in self.data.links.status() {
            let labels = vec![("link", link.name.clone()), ("peer", link.peer_site_name.clone())];
            let up = link.state() == LinkState::Up;
            let rtt = Duration::from_micros(link.rtt_us).as_secs_f64();
            let with_carrier = [&labels[..], &[("carrier", link.carrier)]].concat();
            samples.put("skein_link_up", with_carrier, f64::from(u8::from(up)));
            samples.put("skein_link_rtt", labels.clone(), rtt);
            samples.put("skein_link_sent", labels.clone(), float(link.bytes_sent));
            samples.put("skein_link_received", labels, float(link.bytes_received));
        }
        samples.cap_at_one("skein_link_up");
    }

    fn frames(&self, samples: &mut Samples) {
        let counters = self.data.fabric.counters();
        for (action, count) in [
            ("sent", &counters.frames_sent),
            ("delivered", &counters.frames_delivered),
            ("forwarded", &counters.frames_forwarded),
            ("repaired", &counters.frames_repaired),
        ] {
            let labels = vec![("action", action.to_owned())];
            samples.put("skein_frames", labels, float(count.total()));
        }
        for (reason, count) in [
            ("no_path", &counters.dropped_no_path),
            ("unknown_label", &counters.dropped_unknown_label),
            ("dead_link", &counters.dropped_dead_link),
            ("not_transit", &counters.dropped_not_transit),
            ("unknown_source", &counters.dropped_unknown_source),
            ("congestion", &counters.dropped_congestion),
            ("oversize", &counters.dropped_oversize),
            ("fragments", &counters.dropped_fragments),
            ("unauthenticated", &counters.dropped_unauthenticated),
            ("no_link", &counters.dropped_no_link),
            ("replayed", &counters.dropped_replayed),
            ("handshake", &counters.dropped_handshake),
        ] {
            let labels = vec![("reason", reason.to_owned())];
            samples.put("skein_frames_dropped", labels, float(count.total()));
        }
        for (name, count) in [
            ("skein_link_probes_lost", &counters.probes_lost),
            ("skein_frames_forwarded", &counters.bytes_forwarded),
            ("skein_packets_fragmented", &counters.packets_fragmented),
            ("skein_packets_reassembled", &counters.packets_reassembled),
            ("skein_path_kicks", &counters.kicks),
            ("skein_connections_refused", &counters.connections_refused),
        ] {
            samples.put(name, Vec::new(), float(count.total()));
        }
    }

    fn flows(&self, samples: &mut Samples) {
        let (flows, budget) = (&self.data.flows, &self.data.budget);
        for (edge, edge_name) in [(Edge::Ingress, "ingress"), (Edge::Egress, "egress")] {
            for outcome in Outcome::ALL {
                let labels =
                    vec![("edge", edge_name.to_owned()), ("outcome", outcome.as_str().to_owned())];
                samples.put("skein_flows", labels, float(flows.ended(edge, outcome)));
            }
        }
        for (name, count) in [
            ("skein_sessions_opened", &flows.sessions_opened),
            ("skein_sessions_failed", &flows.sessions_failed),
            ("skein_session_violations", &flows.protocol_violations),
            ("skein_flows_opened", &flows.opened),
            ("skein_flow_retries", &flows.retries),
            ("skein_flow_sent", &flows.bytes_sent),
            ("skein_flow_received", &flows.bytes_received),
        ] {
            samples.put(name, Vec::new(), float(count.total()));
        }
        for way in Way::ALL {
            let labels = vec![("way", way.as_str().to_owned())];
            samples.put("skein_datagrams_sent", labels, float(flows.datagrams.sent(way)));
        }
        for why in DatagramDrop::ALL {
            let labels = vec![("reason", why.as_str().to_owned())];
            samples.put("skein_datagrams_dropped", labels, float(flows.datagrams.dropped(why)));
        }
        samples.put("skein_associations", Vec::new(), float(flows.datagrams.associations()));
        let sessions = u64::try_from(self.data.sessions.count()).unwrap_or(u64::MAX);
        samples.put("skein_sessions", Vec::new(), float(sessions));
        samples.put("skein_flows_active", Vec::new(), float(flows.active()));
        samples.put("skein_memory_used", Vec::new(), float(budget.used_bytes()));
        samples.put("skein_memory_ceiling", Vec::new(), float(budget.ceiling_bytes()));
    }

    fn routing(&self, samples: &mut Samples) {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        samples.put("skein_build_info", vec![("version", version)], 1.0);
        let routing = &self.routing;
        for (name, value) in [
            ("skein_controller_attached", &routing.attached),
            ("skein_lsdb_records", &routing.lsdb_records),
            ("skein_routes", &routing.routes),
            ("skein_addresses", &routing.addresses),
            ("skein_sites_trusted", &routing.sites_trusted),
            ("skein_fib_publications", &routing.fib_publications),
            ("skein_lsdb_size", &routing.lsdb_bytes),
        ] {
            samples.put(name, Vec::new(), float(value.load(Ordering::Relaxed)));
        }
        for (task, (count, duration)) in &*routing.runs.lock() {
            let labels = vec![("task", (*task).to_owned())];
            samples.put("skein_routing_runs", labels.clone(), float(*count));
            samples.put("skein_routing_duration", labels, duration.as_secs_f64());
        }
        let dropped = float(crate::telemetry::lines_dropped());
        samples.put("skein_log_lines_dropped", Vec::new(), dropped);
        for (name, runtime) in [("data", &self.data_runtime), ("control", &self.control_runtime)] {
            let tasks = u64::try_from(runtime.metrics().num_alive_tasks()).unwrap_or(u64::MAX);
            samples.put("skein_tasks", vec![("runtime", name.to_owned())], float(tasks));
        }
    }
}

#[derive(Default)]
struct Samples(Vec<Sample>);

impl Samples {
    fn put(&mut self, name: &'static str, labels: Vec<(&'static str, String)>, value: f64) {
        // Two incoming links of one name and peer would be one series twice, which a scraper refuses: their values add up.
        let same = |sample: &&mut Sample| sample.name == name && sample.labels == labels;
        match self.0.iter_mut().rev().find(same) {
            Some(sample) => sample.value += value,
            None => self.0.push(Sample { name, labels, value }),
        }
    }

    /// Brings a 0-or-1 gauge back into its range after values were added.
    fn cap_at_one(&mut self, name: &'static str) {
        for sample in self.0.iter_mut().filter(|sample| sample.name == name) {
            sample.value = sample.value.min(1.0);
        }
    }
}

/// Prometheus counts in floats; exactness ends at 2^53, which no counter here reaches within years.
#[allow(clippy::cast_precision_loss, reason = "see above")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fmt::Write as _, path::Path};

    fn document() -> String {
        let mut page = String::from(
            "# Metrics\n\nThe router serves these as OpenMetrics text at `/metrics` on the loopback address shown by `skctl status -o wide`.\n\
             This page is generated from the table in `router/router/src/metrics.rs`.\n\n\
             | metric | type | labels | meaning |\n|---|---|---|---|\n",
        );
        for definition in DEFINITIONS {
            let unit = if definition.unit.is_empty() {
                String::new()
            } else {
                format!("_{}", definition.unit)
            };
            let (kind, total) = match definition.kind {
                Kind::Counter => ("counter", "_total"),
                Kind::Gauge => ("gauge", ""),
            };
            let labels: Vec<_> =
                definition.labels.iter().map(|label| format!("`{label}`")).collect();
            writeln!(
                page,
                "| `{}{unit}{total}` | {kind} | {} | {} |",
                definition.name,
                labels.join(", "),
                definition.help
            )
            .unwrap();
        }
        page
    }

    /// `SKEIN_BLESS=1 cargo test -p skein-router` writes the page anew.
    #[test]
    fn the_page_in_docs_is_this_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
        if std::env::var_os("SKEIN_BLESS").is_some() {
            std::fs::write(&path, document()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), document());
    }

    #[test]
    fn names_follow_the_conventions() {
        let mut seen = BTreeSet::new();
        for definition in DEFINITIONS {
            assert!(seen.insert(definition.name), "{} twice", definition.name);
            assert!(definition.name.starts_with("skein_") && !definition.name.ends_with("_total"));
        }
    }

    #[tokio::test]
    async fn the_page_has_every_metric_with_its_labels_and_nothing_else() {
        let sources = crate::data::tests::sources().await;
        sources.routing.ran("input", Duration::from_millis(1));
        let samples = sources.samples();
        for sample in &samples {
            let definition = DEFINITIONS.iter().find(|d| d.name == sample.name);
            let labels: Vec<_> = sample.labels.iter().map(|(name, _)| *name).collect();
            assert_eq!(definition.map(|d| d.labels), Some(labels.as_slice()), "{}", sample.name);
        }
        for definition in DEFINITIONS.iter().filter(|d| !d.labels.starts_with(LINK)) {
            assert!(samples.iter().any(|s| s.name == definition.name), "{}", definition.name);
        }
        let page = Page::new(sources).encode().unwrap();
        assert!(page.contains("skein_frames_dropped_total{reason=\"no_path\"} 0"), "{page}");
        assert!(page.ends_with("# EOF\n"));
    }
}
