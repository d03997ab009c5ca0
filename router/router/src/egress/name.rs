//! What a name resolves to, asked once at a time: a lookup takes a thread, and a resolver that hangs keeps it.

use crate::clock::now;
use parking_lot::Mutex;
use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// What a name resolved to is believed for so long: as long as it takes people to notice.
const RESOLVED_FOR: Duration = Duration::from_secs(5);
/// That it does not resolve is believed for so long: flows do not wait for each other's lookups, and a name that is mended is found soon.
const UNRESOLVED_FOR: Duration = Duration::from_secs(1);
/// A resolver that takes longer is not working.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

type Resolved = Result<Arc<[SocketAddr]>, Arc<io::Error>>;
/// When a lookup ended, which may be long before anybody asks, and how.
type Ended = (Instant, io::Result<Vec<SocketAddr>>);

/// The last answer, and the lookup that runs.
#[derive(Debug, Default)]
pub(super) struct Name {
    known: Mutex<Option<(Instant, Resolved)>>,
    /// Held by whoever drives the lookup; it stays when they give up, and the next one goes on with it.
    running: tokio::sync::Mutex<Option<Lookup>>,
}

struct Lookup(Pin<Box<dyn Future<Output = Ended> + Send>>);

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookup").finish_non_exhaustive()
    }
}

impl Name {
    /// The addresses, at least one, by `lookup` if nothing is known and no other lookup runs.
    ///
    /// # Errors
    /// Of the lookup; the same to everybody who asks within a second.
    ///
    /// # Cancel safety
    /// A lookup begun goes on with the next one who asks.
    pub(super) async fn resolve<F>(&self, lookup: impl Fn() -> F) -> Resolved
    where
        F: Future<Output = Ended> + Send + 'static,
    {
        if let Some(known) = self.known() {
            return known;
        }
        timeout(RESOLVE_TIMEOUT, self.look_up(lookup))
            .await
            .unwrap_or_else(|_elapsed| self.learn(now(), Err(io::ErrorKind::TimedOut.into())))
    }

    /// Does not believe the addresses any more: nobody was there.
    pub(super) fn doubt(&self) {
        self.known.lock().take_if(|(_, resolved)| resolved.is_ok());
    }

    async fn look_up<F>(&self, lookup: impl Fn() -> F) -> Resolved
    where
        F: Future<Output = Ended> + Send + 'static,
    {
        let mut running = self.running.lock().await;
        loop {
            // Whoever held it may have found out.
            if let Some(known) = self.known() {
                return known;
            }
            let begun = running.get_or_insert_with(|| Lookup(Box::pin(lookup())));
            let (at, outcome) = begun.0.as_mut().await;
            *running = None;
            // Looked at above: a lookup that was given up may have ended too long ago.
            drop(self.learn(at, outcome));
        }
    }

    fn known(&self) -> Option<Resolved> {
        let known = self.known.lock();
        let (at, resolved) = known.as_ref()?;
        let valid = if resolved.is_ok() { RESOLVED_FOR } else { UNRESOLVED_FOR };
        let age = now().saturating_duration_since(*at);
        (age < valid).then(|| resolved.clone())
    }

    fn learn(&self, at: Instant, outcome: io::Result<Vec<SocketAddr>>) -> Resolved {
        let resolved = match outcome {
            Ok(addresses) if addresses.is_empty() => Err(Arc::new(io::ErrorKind::NotFound.into())),
            Ok(addresses) => Ok(addresses.into()),
            Err(error) => Err(Arc::new(error)),
        };
        *self.known.lock() = Some((at, resolved.clone()));
        resolved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::{sync::Notify, task::JoinSet, time};

    #[tokio::test(start_paused = true)]
    async fn one_lookup_runs_however_many_ask_and_however_long_it_takes() {
        let (name, lookups) = (Arc::new(Name::default()), Arc::new(AtomicUsize::new(0)));
        let answer = Arc::new(Notify::new());
        let ask = || {
            let (name, lookups, answer) = (name.clone(), lookups.clone(), answer.clone());
            async move {
                let lookup = || {
                    lookups.fetch_add(1, Ordering::Relaxed);
                    let answer = answer.clone();
                    async move {
                        answer.notified().await;
                        (now(), Ok(vec![([127, 0, 0, 1], 1).into()]))
                    }
                };
                name.resolve(lookup).await
            }
        };
        let mut asking: JoinSet<_> = (0..100).map(|_| ask()).collect();
        while let Some(outcome) = asking.join_next().await {
            assert_eq!(outcome.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        let begun = time::Instant::now();
        ask().await.unwrap_err();
        assert_eq!(begun.elapsed(), Duration::ZERO, "known to fail for a second");
        time::advance(UNRESOLVED_FOR).await;
        answer.notify_one();
        assert_eq!(ask().await.unwrap().len(), 1);
        assert_eq!(lookups.load(Ordering::Relaxed), 1);
        name.doubt();
        answer.notify_one();
        ask().await.unwrap();
        assert_eq!(lookups.load(Ordering::Relaxed), 2);
    }
    #[tokio::test(start_paused = true)]
    async fn the_answer_to_a_lookup_that_was_given_up_is_as_old_as_it_is() {
        let (name, answer, lookups) =
            (Name::default(), Arc::new(Notify::new()), AtomicUsize::new(0));
        let lookup = || {
            let (answer, port) = (answer.clone(), lookups.fetch_add(1, Ordering::Relaxed));
            // Like the resolver's thread, it ends whether anybody waits or not.
            let mut resolver = JoinSet::new();
            resolver.spawn(async move {
                answer.notified().await;
                (now(), Ok(vec![([127, 0, 0, 1], u16::try_from(port).unwrap()).into()]))
            });
            async move { resolver.join_next().await.unwrap().unwrap() }
        };
        name.resolve(lookup).await.unwrap_err();
        answer.notify_one();
        time::sleep(10 * RESOLVED_FOR).await;
        answer.notify_one();
        assert_eq!(name.resolve(lookup).await.unwrap()[0].port(), 1, "the name has moved since");
    }
}
