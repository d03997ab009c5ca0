//! What names of others mean on this host without us: what is written to `/etc/hosts` would go before it.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path, sync::Arc, time::Duration};

use skein_core::{Address, SiteId};
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::{clock, controller::Controller, hosts};

/// Where the domains are that resolvers append to names.
const RESOLVER_FILE: &str = "/etc/resolv.conf";
/// Domains looked at; resolvers take as many.
const SEARCH_MAX: usize = 32;
/// How long a name counts as what it was found to be: a host moves to another network, somebody sets up a machine.
const VERDICT_S: i64 = 600;
/// Names looked up at a time. Each is a thread while the resolver takes its time.
const LOOKUPS_MAX: usize = 8;
/// A resolver that takes longer does not answer: nobody here gets anywhere by this name now.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);

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

    /// The next names to look up of those that are `wanted`, which have the sites that serve them; forgets all others. What nobody has
    /// asked for yet comes first, then what was asked for longest ago, and of either a name of each site in turn: one that offers many
    /// hides nobody else's.
    pub(crate) fn due(
        &mut self,
        wanted: &BTreeMap<Address, SiteId>,
        now_unix_s: i64,
    ) -> Vec<Address> {
        self.0.retain(|name, _| wanted.contains_key(name));
        let holds = |verdict: &Verdict| {
            (verdict.at_unix_s..verdict.at_unix_s.saturating_add(VERDICT_S)).contains(&now_unix_s)
        };
        let asked = |name: &Address| self.0.get(name).map(|verdict| verdict.at_unix_s);
        let due = wanted.iter().filter(|(name, _)| !self.0.get(*name).is_some_and(holds));
        let mut due: Vec<(Option<i64>, &Address, SiteId)> =
            due.map(|(name, site)| (asked(name), name, *site)).collect();
        due.sort_unstable();
        let mut turns = BTreeMap::<(bool, SiteId), usize>::new();
        let mut due: Vec<(bool, usize, &Address)> = due
            .into_iter()
            .map(|(asked, name, site)| {
                let turn = turns.entry((asked.is_some(), site)).or_default();
                *turn += 1;
                (asked.is_some(), *turn, name)
            })
            .collect();
        // Stable: within a turn it stays as it is.
        due.sort_by_key(|(is_known, turn, _)| (*is_known, *turn));
        due.into_iter().take(LOOKUPS_MAX).map(|(_, _, name)| name.clone()).collect()
    }

    /// Returns whether that changes what is known.
    pub(crate) fn learn(&mut self, name: Address, is_free: bool, now_unix_s: i64) -> bool {
        let known = self.0.insert(name, Verdict { is_free, at_unix_s: now_unix_s });
        known.is_none_or(|known| known.is_free != is_free)
    }
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

    #[test]
    fn names_are_looked_up_before_they_count_and_again() {
        let [db, web]: [Address; 2] = ["db", "web"].map(|name| name.parse().unwrap());
        let site = SiteId([1; 32]);
        let wanted = BTreeMap::from([(db.clone(), site), (web.clone(), site)]);
        let mut names = Names::default();
        assert_eq!(names.due(&wanted, 0), [db.clone(), web.clone()]);
        assert!(!names.is_free(&db), "nobody has asked yet");
        assert!(names.learn(db.clone(), true, 0) && names.learn(web.clone(), false, 0));
        assert!(names.is_free(&db) && !names.is_free(&web));
        assert_eq!(names.due(&wanted, VERDICT_S - 1), []);
        assert_eq!(names.due(&wanted, VERDICT_S).len(), 2);
        assert!(!names.learn(web, false, VERDICT_S) && names.learn(db.clone(), false, VERDICT_S));
        assert_eq!(names.due(&BTreeMap::from([(db, site)]), VERDICT_S), []);
        assert_eq!(names.0.len(), 1);
    }

    #[test]
    fn who_offers_many_names_hides_nobody_elses() {
        let name = |text: String| text.parse::<Address>().unwrap();
        let mut wanted: BTreeMap<Address, SiteId> =
            (0..5_000).map(|n| (name(format!("0-{n}")), SiteId([1; 32]))).collect();
        wanted.insert(name("web".into()), SiteId([2; 32]));
        let mut names = Names::default();
        let due = names.due(&wanted, 0);
        assert!(due.len() == LOOKUPS_MAX && due.contains(&name("web".into())), "{due:?}");
        for name in due {
            names.learn(name, true, 0);
        }
        // Some of the other's are never asked for in time, and what is known is asked for again only after those.
        let due = names.due(&wanted, VERDICT_S);
        assert!(due.len() == LOOKUPS_MAX && !due.contains(&name("web".into())), "{due:?}");
    }
}
