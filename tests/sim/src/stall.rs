//! Watches flows while they run: one with bytes to say moves on as long as there is a way.

use crate::{flow::Attempt, oracle, run::Run};
use std::collections::BTreeMap;

/// With a way that no fault touches, a flow stands still for so long at most: what it was on before dies, and another is found.
const STALLS_MS: u64 = 6_000;

/// A direction of a try of a flow: flow, try, towards the client.
type Direction = (usize, u32, bool);

/// How far flows had come when they were last seen to move.
#[derive(Debug, Default)]
pub(crate) struct Stalls {
    moved: BTreeMap<Direction, (u64, u64)>,
    failures: Vec<String>,
}

impl Stalls {
    /// To be called every second or so.
    pub(crate) fn look(&mut self, run: &Run<'_>) {
        for ((flow, number), attempt) in run.desk.ledger.attempts() {
            self.look_at((flow, number, true), &attempt, run);
            self.look_at((flow, number, false), &attempt, run);
        }
    }

    fn look_at(&mut self, direction: Direction, attempt: &Attempt, run: &Run<'_>) {
        let (flow, number, is_to_client) = direction;
        let plan = &run.scenario.flows[flow];
        let Some((far, server)) = attempt.servers.first() else { return };
        let (reader, writer, script) = match is_to_client {
            true => (&attempt.client, server, &plan.client),
            false => (server, &attempt.client, &plan.server),
        };
        let waits = attempt.client.read > 0
            && reader.ended.is_none()
            && reader.over_ms.is_none()
            && script.reads_per_s == 0
            && reader.read < writer.written;
        // Within a site there is no way that could be lost, and of a site that has left nobody says any more what was not sent.
        if !waits || plan.site == *far || run.gone[plan.site] || run.gone[*far] {
            self.moved.remove(&direction);
            return;
        }
        let now_ms = run.desk.now_ms();
        let (read, since_ms) = self.moved.entry(direction).or_insert((reader.read, now_ms));
        if *read != reader.read {
            (*read, *since_ms) = (reader.read, now_ms);
        }
        let since_ms = *since_ms;
        if now_ms - since_ms >= STALLS_MS
            && self.failures.is_empty()
            && oracle::is_surely_connected(run, plan.site, *far, now_ms - STALLS_MS, now_ms)
        {
            self.failures.push(format!(
                "flow {flow}.{number} stands still from {since_ms} to {now_ms} ms, and there is a way from site {} to {far}: \
                 {} of {} bytes were read",
                plan.site, reader.read, writer.written
            ));
        }
    }

    /// Flows that stood still.
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }
}
