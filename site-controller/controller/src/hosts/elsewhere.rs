//! What names of others mean on this host without us: what is written to `/etc/hosts` would go before it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use skein_core::{Address, SiteId};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::{clock, controller::Controller, hosts};

/// Where the domains are that resolvers append to names.
const RESOLVER_FILE: &str = "/etc/resolv.conf";
/// Domains looked at; resolvers take as many.
const SEARCH_MAX: usize = 32;
/// When a name is due again: a host moves to another network, somebody sets up a machine.
const VERDICT_S: i64 = 600;
/// How long a name counts at most as what it was found to be, where its turn does not come: far above the time that the names of a large
/// network take, with a resolver that answers.
const VERDICT_MAX_S: i64 = 6 * VERDICT_S;
/// Names looked up at a time. Each is a thread while the resolver takes its time.
const LOOKUPS_MAX: usize = 8;
/// How many of them are kept for names that are known, which would never be due beside a site that offers new ones all the time.
const KNOWN_MIN: usize = 2;
/// A resolver that takes longer does not answer: nobody here gets anywhere by this name now.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);

/// Names that others chose, with the sites that serve them.
pub(crate) type Wanted = BTreeMap<Address, BTreeSet<SiteId>>;

/// Names of others, as far as they have been looked up.
#[derive(Debug, Default)]
pub(crate) struct Names(BTreeMap<Address, Verdict>);

#[derive(Debug)]
struct Verdict {
    is_free: bool,
    at_unix_s: i64,
}

impl Names {
    /// Whether the name is known to mean nothing here.
    pub(crate) fn is_free(&self, name: &Address) -> bool {
        self.0.get(name).is_some_and(|verdict| verdict.is_free)
    }

    /// Forgets what nobody wants to know any more, and what was asked for too long ago. Returns whether a name that was free no longer is.
    pub(crate) fn forget(&mut self, wanted: &Wanted, now_unix_s: i64) -> bool {
        let is_over =
            |verdict: &Verdict| now_unix_s.saturating_sub(verdict.at_unix_s) >= VERDICT_MAX_S;
        let is_kept =
            |name: &Address, verdict: &Verdict| wanted.contains_key(name) && !is_over(verdict);
        let gone = self.0.extract_if(.., |name, verdict| !is_kept(name, verdict));
        // Every one of them, not up to the first.
        gone.filter(|(_, verdict)| verdict.is_free).count() > 0
    }

    /// The next names to look up of those that are `wanted`. What nobody has asked for yet comes first, but for [`KNOWN_MIN`], then what
    /// was asked for longest ago, and of either a name of each site in turn: one that offers many, be it along with others, hides nobody
    /// else's.
    pub(crate) fn due(&self, wanted: &Wanted, now_unix_s: i64) -> Vec<Address> {
        let holds = |verdict: &Verdict| {
            (verdict.at_unix_s..verdict.at_unix_s.saturating_add(VERDICT_S)).contains(&now_unix_s)
        };
        let due = wanted.iter().filter(|(name, _)| !self.0.get(*name).is_some_and(holds));
        let (mut fresh, mut known) = (Vec::new(), Vec::new());
        for (name, sites) in due {
            match self.0.get(name) {
                None => fresh.push((0, name, sites)),
                Some(verdict) => known.push((verdict.at_unix_s, name, sites)),
            }
        }
        let (fresh, known) = (in_turn(fresh), in_turn(known));
        let kept = known.len().min(KNOWN_MIN);
        let fresh = fresh.into_iter().take(LOOKUPS_MAX - kept);
        fresh.chain(known).take(LOOKUPS_MAX).cloned().collect()
    }

    /// Returns whether that changes what is known.
    pub(crate) fn learn(&mut self, name: Address, is_free: bool, now_unix_s: i64) -> bool {
        let known = self.0.insert(name, Verdict { is_free, at_unix_s: now_unix_s });
        known.is_none_or(|known| known.is_free != is_free)
    }
}

/// Names, with when they were asked for and by which sites they are served, in the order in which they are due: the first of every site,
/// then the second. The place of a name is the best that one of its sites gives it, so that no other can push it back by serving it too.
fn in_turn<'a>(mut names: Vec<(i64, &'a Address, &BTreeSet<SiteId>)>) -> Vec<&'a Address> {
    names.sort_unstable_by_key(|(asked, name, _)| (*asked, *name));
    let mut turns = BTreeMap::<SiteId, usize>::new();
    let turn_of = |(_, name, sites): (i64, &'a Address, &BTreeSet<SiteId>)| {
        let turns = sites.iter().map(|site| {
            let turn = turns.entry(*site).or_default();
            *turn += 1;
            *turn
        });
        (turns.min(), name)
    };
    let mut in_turn: Vec<_> = names.into_iter().map(turn_of).collect();
    // Stable: within a turn it stays as it is.
    in_turn.sort_by_key(|(turn, _)| *turn);
    in_turn.into_iter().map(|(_, name)| name).collect()
}

/// Looks names up until the controller ends.
///
/// # Cancel safety
/// Dropping it leaves names to the next one; look-ups under way end by themselves.
pub(crate) async fn run(controller: Arc<Controller>) {
    let mut interval = tokio::time::interval(Duration::from_secs(1));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            _ = interval.tick() => {} // cancel-safe
        }
        let due = controller.names_due(clock::unix_s());
        if due.is_empty() {
            continue;
        }
        let here = Arc::new(Surroundings::read());
        let mut lookups = JoinSet::new();
        for name in due {
            let here = Arc::clone(&here);
            lookups.spawn(async move {
                let is_taken = here.is_taken(name.as_str(), resolve).await;
                (name, !is_taken)
            });
        }
        let verdicts = tokio::select! {
            () = controller.shutdown.cancelled() => return, // cancel-safe
            verdicts = lookups.join_all() => verdicts, // dropped as a whole
        };
        controller.names_learned(verdicts, clock::unix_s());
    }
}

/// What the host's resolver says, whatever it is made of. Whoever does not answer knows no such name.
async fn resolve(name: String) -> Vec<IpAddr> {
    let lookup = tokio::net::lookup_host((name, 0));
    match tokio::time::timeout(LOOKUP_TIMEOUT, lookup).await {
        Ok(Ok(found)) => found.map(|addr| addr.ip()).collect(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

/// What decides here what a name means.
#[derive(Debug, Default)]
struct Surroundings {
    /// This machine.
    own: String,
    search: Vec<String>,
    /// What blocks of sites on this host name.
    named: BTreeMap<String, IpAddr>,
}

impl Surroundings {
    fn read() -> Self {
        let text = |file: &str| match fs::read_to_string(Path::new(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(%error, file, "cannot be read");
                String::new()
            }
            read => read.unwrap_or_default(),
        };
        let own = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
        let named = hosts::blocks(&text(hosts::FILE));
        Self { own, search: search(&text(RESOLVER_FILE)), named }
    }

    /// Whether a name leads anywhere but to our own endpoints. Absolute names are asked for as well, which our blocks do not
    /// have: with a name that is in one of them the resolver would look no further.
    async fn is_taken(&self, name: &str, resolve: impl AsyncFn(String) -> Vec<IpAddr>) -> bool {
        if name == self.own || Some(name) == self.own.split('.').next() {
            return true;
        }
        let bare = (!self.named.contains_key(name)).then(|| name.to_owned());
        let absolute = self.search.iter().map(|domain| format!("{name}.{domain}."));
        for asked in bare.into_iter().chain([format!("{name}.")]).chain(absolute) {
            let found = resolve(asked).await;
            if found.iter().any(|ip| !self.named.values().any(|ours| ours == ip)) {
                return true;
            }
        }
        false
    }
}

/// Domains that a resolver with this configuration appends.
fn search(resolver: &str) -> Vec<String> {
    let mut search = Vec::new();
    for line in resolver.lines() {
        let mut words = line.split_ascii_whitespace();
        // The last line of either kind counts.
        if let Some("search" | "domain") = words.next() {
            let domains = words.map(|domain| domain.trim_matches('.').to_owned());
            search = domains.filter(|domain| !domain.is_empty()).take(SEARCH_MAX).collect();
        }
    }
    search
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_that_leads_elsewhere_is_taken() {
        let ours: IpAddr = "127.64.1.2".parse().unwrap();
        let here = Surroundings {
            own: "box.corp.example".into(),
            search: search("search old\nnameserver 192.0.2.1\nsearch corp.example. lab\n"),
            named: hosts::blocks(
                "# begin skein a\n127.64.1.2 db\n127.64.1.2 mail\n# end skein a\n",
            ),
        };
        let known = |name: String| -> Vec<IpAddr> {
            match name.as_str() {
                "mail.corp.example." | "printer." | "nas" => vec!["192.0.2.7".parse().unwrap()],
                // Some resolvers take /etc/hosts for a zone.
                "db." => vec![ours],
                "db" | "mail" => panic!("that is what we have written"),
                _ => Vec::new(),
            }
        };
        for (name, is_taken) in [
            ("mail", true),
            ("printer", true),
            ("nas", true),
            ("box", true),
            ("db", false),
            ("web.prod", false),
        ] {
            let found = here.is_taken(name, async |name| known(name)).await;
            assert_eq!(found, is_taken, "{name}");
        }
    }

    fn name(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn names_are_looked_up_before_they_count_and_again() {
        let [db, web] = ["db", "web"].map(name);
        let site = BTreeSet::from([SiteId([1; 32])]);
        let wanted = BTreeMap::from([(db.clone(), site.clone()), (web.clone(), site.clone())]);
        let mut names = Names::default();
        assert_eq!(names.due(&wanted, 0), [db.clone(), web.clone()]);
        assert!(!names.is_free(&db), "nobody has asked yet");
        assert!(names.learn(db.clone(), true, 0) && names.learn(web.clone(), false, 0));
        assert!(names.is_free(&db) && !names.is_free(&web));
        assert_eq!(names.due(&wanted, VERDICT_S - 1), []);
        assert_eq!(names.due(&wanted, VERDICT_S).len(), 2);
        assert!(!names.learn(web, false, VERDICT_S) && names.learn(db.clone(), false, VERDICT_S));
        let wanted = BTreeMap::from([(db, site)]);
        assert!(!names.forget(&wanted, VERDICT_S), "it was not free");
        assert_eq!(names.due(&wanted, VERDICT_S), []);
        assert_eq!(names.0.len(), 1);
    }

    #[test]
    fn what_was_asked_for_too_long_ago_does_not_count() {
        let [db, web] = ["db", "web"].map(name);
        let wanted = [&db, &web].map(|name| (name.clone(), BTreeSet::from([SiteId([1; 32])])));
        let (mut names, wanted) = (Names::default(), BTreeMap::from(wanted));
        names.learn(db.clone(), true, 0);
        names.learn(web.clone(), true, 1);
        assert!(!names.forget(&wanted, VERDICT_MAX_S - 1));
        assert!(names.forget(&wanted, VERDICT_MAX_S));
        assert!(!names.is_free(&db) && names.is_free(&web));
        assert_eq!(names.due(&wanted, VERDICT_MAX_S), [db, web]);
    }

    /// Sites of which one offers 5,000 names, and "web" as well, which is the other's.
    fn beside_one_that_offers_many() -> (Wanted, BTreeSet<SiteId>) {
        let greedy = BTreeSet::from([SiteId([1; 32])]);
        let mut wanted: Wanted =
            (0..5_000).map(|n| (name(&format!("0-{n}")), greedy.clone())).collect();
        wanted.insert(name("web"), BTreeSet::from([SiteId([1; 32]), SiteId([2; 32])]));
        (wanted, greedy)
    }

    #[test]
    fn who_offers_many_names_hides_nobody_elses() {
        let (wanted, _) = beside_one_that_offers_many();
        let due = Names::default().due(&wanted, 0);
        assert!(due.len() == LOOKUPS_MAX && due.contains(&name("web")), "{due:?}");
    }

    #[test]
    fn who_offers_new_names_all_the_time_keeps_none_from_being_asked_for_again() {
        let (mut wanted, greedy) = beside_one_that_offers_many();
        let (mut names, mut now) = (Names::default(), 0);
        names.learn(name("web"), true, now);
        now = VERDICT_S;
        let due = names.due(&wanted, now);
        assert!(due.len() == LOOKUPS_MAX && due.contains(&name("web")), "{due:?}");
        // What is known of the other's is in turn with it as well.
        for name in due.into_iter().filter(|due| *due != name("web")) {
            names.learn(name, true, 0);
        }
        wanted.extend((0..9).map(|n| (name(&format!("00-{n}")), greedy.clone())));
        let due = names.due(&wanted, now);
        assert!(due.len() == LOOKUPS_MAX && due.contains(&name("web")), "{due:?}");
    }
}
