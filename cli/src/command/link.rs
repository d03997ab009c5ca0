//! `skctl link`, `skctl link list`, `skctl unlink`

use std::{path::Path, time::Duration as StdDuration};

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use skein_api::{
    Duration, TOKEN_LEN_MAX, Token,
    status::{LinkRow, NetworkStatus},
};
use skein_wire::proto::site::{Progress as ProgressMessage, RedeemTokenRequest};

use crate::{
    args::Global,
    client::{self, Client},
    clock,
    command::proxy::{ProxyArgs, Wanted},
    error::Failure,
    input,
    output::{self, Show, note},
    progress::Progress,
    render,
};

/// How much longer than its own timeout the controller may take to say that it gave up.
const GRACE: StdDuration = StdDuration::from_secs(5);

/// How long what the other site knows may take to arrive after the link is up.
const ARRIVAL_MAX: StdDuration = StdDuration::from_secs(3);
const ARRIVAL_POLL: StdDuration = StdDuration::from_millis(50);

/// Joins another site with a token, or lists links
///
/// Redeems the token and waits until the link is up. The token is read from a file or from standard input, never from the
/// command line, where other users of this machine could read it.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "\
Examples:
  skctl link branch.token
  ssh hub skctl token create - | skctl link -
  skctl link backup.token --cost 10 --name backup
  skctl link partner.token --consume catalogue --provide 'orders.*'
  skctl link list -o wide")]
pub(crate) struct Link {
    /// Token file, or - for standard input
    #[arg(value_name = "FILE|-", required = true)]
    file: Option<String>,
    /// Cost of the link; default: the token's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65535))]
    cost: Option<u32>,
    /// Name of the link; default: the name of the other site
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Joins the other site's network although this site belongs to one already
    #[arg(long)]
    merge: bool,
    /// With a guest's token: address, or beginning of addresses followed by *, that this site will reach there: nothing else is
    /// taken from the other site; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    consume: Vec<String>,
    /// With a guest's token: address, or beginning of addresses followed by *, that the other site may reach here; may be given
    /// several times
    #[arg(long, value_name = "ADDRESS")]
    provide: Vec<String>,
    #[command(flatten)]
    proxy: ProxyArgs,
    /// How long it may take until the link is up, claim included, before it gives up with exit code 3; that nothing answers at the
    /// token's endpoints is told after 8s at most
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    timeout: Duration,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    List(List),
}

/// Lists links, outgoing and incoming
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  skctl link list\n  skctl link list -o wide")]
struct List {}

/// Takes a link down and forgets it
///
/// Says which trust remains: the other site stays a member of the network as long as somebody endorses it. With --withdraw this
/// site no longer does, so that the other site is out wherever nobody else endorses it, running flows included.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl unlink hub
  skctl unlink partner --withdraw        no more trust by this site; incoming links too")]
pub(crate) struct Unlink {
    /// Name as shown by `link list`
    name: String,
    /// Withdraws this site's endorsement of the other site as well
    #[arg(long)]
    withdraw: bool,
}

impl Link {
    /// Whether the controller may go on when this command has ended: it finishes a claim, so that no token is used for nothing.
    pub(crate) fn redeems(&self) -> bool {
        self.file.is_some() && self.action.is_none()
    }
}

pub(crate) async fn run(global: &Global, args: Link) -> Result<(), Failure> {
    match (&args.action, &args.file) {
        (Some(Action::List(_)), _) => list(global).await,
        (None, Some(file)) => redeem(global, &args, file).await,
        (None, None) => Err(Failure::usage("no token file given")),
    }
}

async fn redeem(global: &Global, args: &Link, file: &str) -> Result<(), Failure> {
    refuse_literal(file)?;
    let proxy = args.proxy.wanted()?;
    if let Some(text) = args.proxy.note() {
        note(global, format_args!("note: {text}"));
    }
    let mut progress = Progress::start(global, "reading the token");
    let text = {
        let file = file.to_owned();
        input::blocking(move || input::read(&file, TOKEN_LEN_MAX)).await?
    };
    let text = String::from_utf8(text).map_err(|_| {
        Failure::new("this is not a Skein token").because("it is not text").next(NEW_TOKEN)
    })?;
    let token = check(&text, clock::now())?;
    progress.step(format!("connecting to {:?}", output::printable(&token.issuer_name)));
    let began = clock::instant();
    let patience = || args.timeout.0.saturating_sub(began.elapsed());
    let limit = args.timeout.0.saturating_add(GRACE);
    let claim = claim(global, args, proxy, text, &patience, &mut progress);
    let (made, mut client) = tokio::time::timeout(limit, claim).await.map_err(|_| {
        Failure::timeout(format_args!("the link is not up after {}", args.timeout))
            .because("the controller still tries, or does not answer")
            .next("see `skctl link list` and `skctl doctor`")
    })??;
    progress.step("waiting for what the other site knows");
    let patience = patience().min(ARRIVAL_MAX);
    // The link is up however this ends; what is missing arrives later.
    let _ = tokio::time::timeout(patience, arrival(&mut client, &token.issuer.to_string())).await;
    progress.finish();
    for text in &made.notes {
        note(global, output::printable(text));
    }
    output::show(
        global,
        &Linked { name: made.name, peer: token.issuer_name, peer_id: token.issuer.to_string() },
    )
}

/// Has the controller redeem the token `text`, within what is left of the user's patience, and waits until the link is up.
async fn claim(
    global: &Global,
    args: &Link,
    proxy: Wanted,
    text: String,
    patience: &impl Fn() -> StdDuration,
    progress: &mut Progress,
) -> Result<(ProgressMessage, Client), Failure> {
    let mut client = Client::connect(global).await?;
    for text in proxy.apply(&mut client, &client::paths(global)?).await? {
        note(global, format_args!("note: {text}"));
    }
    // 0 would be the controller's own idea of patience.
    let timeout_ms = u64::try_from(patience().as_millis()).unwrap_or(u64::MAX).max(1);
    let request = RedeemTokenRequest {
        token: text,
        name: args.name.clone().unwrap_or_default(),
        cost: args.cost.unwrap_or(0),
        merge: args.merge,
        timeout_ms,
        consume: args.consume.clone(),
        provide: args.provide.clone(),
    };
    let made = follow(client.raw().redeem_token(request).await?.into_inner(), progress).await?;
    Ok((made, client))
}

/// Waits until a router of `site` can be reached: then its database is here, and commands that follow find what it offers,
/// at local endpoints that are open.
async fn arrival(client: &mut Client, site: &str) -> Result<(), Failure> {
    loop {
        let network: NetworkStatus = client.query("network").await?;
        let mut routers =
            network.sites.iter().filter(|known| known.id == site).flat_map(|known| &known.routers);
        let is_opening = network.services.iter().any(|service| service.state == "opening");
        if routers.any(|router| router.reachable) && !is_opening {
            return Ok(());
        }
        clock::sleep(ARRIVAL_POLL).await;
    }
}

const NEW_TOKEN: &str = "make one with `skctl token create` on the other site";

/// Refuses what looks like a token instead of the name of a file with one.
fn refuse_literal(file: &str) -> Result<(), Failure> {
    let literal = Token::looks_like(file)
        || file.contains('\n')
        || (file.starts_with("eyJ") && !Path::new(file).exists());
    if literal {
        return Err(Failure::usage("a token does not belong on the command line")
            .because(
                "other users can read it in the process list, and shells keep it in their history",
            )
            .next("write it to a file, or pipe it: skctl link -"));
    }
    Ok(())
}

fn check(text: &str, now: Timestamp) -> Result<Token, Failure> {
    let token: Token = text.parse().map_err(Failure::new)?;
    let expires = Timestamp::from_second(token.expires_unix_s)
        .map_or_else(|_| "an impossible time".to_owned(), |time| time.to_string());
    token.check_expiry(now.as_second(), &expires).map_err(|error| {
        let seconds = now.as_second();
        let here = Timestamp::from_second(seconds).unwrap_or(now);
        Failure::new(error).because(format_args!("this machine's clock says {here}"))
    })?;
    Ok(token)
}

/// Shows progress until the stream says how it ended; returns its last message, which names what was made.
pub(crate) async fn follow(
    mut stream: tonic::Streaming<ProgressMessage>,
    progress: &mut Progress,
) -> Result<ProgressMessage, Failure> {
    while let Some(message) = stream.message().await? {
        if !message.done {
            progress.step(output::printable(&message.step));
            continue;
        }
        if message.error.is_empty() {
            return Ok(message);
        }
        let error = output::printable(&message.error);
        return Err(if message.timed_out { Failure::timeout(error) } else { Failure::new(error) });
    }
    Err(Failure::new("the controller ended before it was done").next("see `skctl logs`"))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Linked {
    name: String,
    peer: String,
    peer_id: String,
}

impl Show for Linked {
    fn table(&self, _: bool) -> String {
        format!("Link {} to site {} is up.\n", self.name, output::printable(&self.peer))
    }

    fn names(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}

async fn list(global: &Global) -> Result<(), Failure> {
    let links: Vec<LinkRow> = Client::connect(global).await?.query("links").await?;
    output::show(global, &render::Links(links))
}

pub(crate) async fn unlink(global: &Global, args: Unlink) -> Result<(), Failure> {
    let mut client = Client::connect(global).await?;
    let links: Vec<LinkRow> = client.query("links").await?;
    let named = |link: &&LinkRow| link.name == args.name;
    if !args.withdraw
        && links.iter().filter(named).count() > 0
        && links.iter().filter(named).all(|link| link.incoming)
    {
        return Err(Failure::new(format_args!("{} is an incoming link", args.name))
            .because("the other site made it, and would make it again")
            .next(
                "run `skctl unlink` there, or here with --withdraw to trust that site no longer",
            ));
    }
    let notes = client.unlink(&args.name, args.withdraw).await?;
    note(global, format_args!("Link {} is gone.", args.name));
    for text in notes {
        note(global, text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Exit;

    #[test]
    fn literal_tokens_are_refused_as_usage() {
        for literal in ["SKEIN-TOKEN-1", "SKEIN-TOKEN-1\nabc", "eyJlbmRwb2ludHMiOlsi"] {
            assert_eq!(refuse_literal(literal).unwrap_err().exit(), Exit::Usage, "{literal}");
        }
        assert!(refuse_literal("branch.token").is_ok());
    }

    #[test]
    fn expired_tokens_name_both_times() {
        let token = Token {
            endpoints: vec!["h:1".into()],
            issuer: skein_core::SiteId([1; 32]),
            issuer_name: "hub".into(),
            ca_sha256: [0; 32],
            code: skein_api::Code::new(vec![0; 16]).unwrap(),
            network: skein_core::SiteId([1; 32]),
            expires_unix_s: 0,
            uses: 1,
            cost: 1,
            guest: false,
        };
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let error = check(&token.encode(), now).unwrap_err().to_string();
        assert!(error.contains("1970-01-01T00:00:00Z") && error.contains("2026-01-01"), "{error}");
    }
}
