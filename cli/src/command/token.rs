//! `skctl token create|list|delete`

use std::{ffi::OsStr, path::Path};

use clap::{Args, Subcommand};
use serde::Serialize;
use skein_api::{Duration, Resource, status::TokenRow};
use skein_wire::proto::site::CreateTokenRequest;

use crate::{
    args::Global,
    client::Client,
    clock,
    command::resource::free_name,
    error::Failure,
    input,
    output::{self, Show, columns, note},
    render::short,
};

/// Lets other sites in
#[derive(Debug, Args)]
pub(crate) struct Token {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(Create),
    List(List),
    Delete(Delete),
}

/// Makes a token with which another site can link to this one
///
/// The token is a secret until it is used or expires. It contains a code and what pins this site's certificate authority,
/// never a key. The file is written with mode 0600.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  skctl token create branch.token
  skctl token create fleet.token --uses 20 --expires 2h
  skctl token create - | ssh branch skctl link -
  skctl token create partner.token --guest --consume catalogue --provide 'orders.*'
  skctl token create fleet.token --grant fleet       after: skctl apply -f fleet.yaml")]
struct Create {
    /// File to write, or - for standard output
    #[arg(value_name = "FILE|-")]
    file: String,
    /// How many sites may use it
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    uses: u32,
    /// How long it can be used
    #[arg(long, default_value = "15m", value_name = "DURATION")]
    expires: Duration,
    /// Cost of the link: paths over cheaper links are preferred
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65535))]
    cost: u32,
    /// For a site of somebody else: it may do what --consume and --provide name, and nothing without
    #[arg(long)]
    guest: bool,
    /// Address, or beginning of addresses followed by *, that guests may reach; may be given several times
    #[arg(long, value_name = "ADDRESS", requires = "guest")]
    consume: Vec<String>,
    /// Address, or beginning of addresses followed by *, that guests may serve; may be given several times
    #[arg(long, value_name = "ADDRESS", requires = "guest")]
    provide: Vec<String>,
    /// Lets a site that belongs to another network join both networks
    #[arg(long, conflicts_with = "guest")]
    merge: bool,
    /// Name of the grant, for `token list` and `token delete`; default: that of the file
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Makes the token of an AccessGrant that was applied, which says everything else
    #[arg(long, value_name = "NAME", conflicts_with_all = ["uses", "expires", "cost", "guest", "merge", "name"])]
    grant: Option<String>,
    /// Replaces the file if it exists
    #[arg(long)]
    force: bool,
}

/// Lists the tokens made here, without their secrets; those that expired more than a day ago are forgotten
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl token list")]
struct List {}

/// Makes a token useless; links made with it stay
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  skctl token delete branch")]
struct Delete {
    /// Name as shown by `token list`
    name: String,
}

pub(crate) async fn run(global: &Global, args: Token) -> Result<(), Failure> {
    match args.action {
        Action::Create(args) => create(global, args).await,
        Action::List(_) => list(global).await,
        Action::Delete(args) => delete(global, args).await,
    }
}

async fn create(global: &Global, args: Create) -> Result<(), Failure> {
    let path = Path::new(&args.file);
    // Checked first: a token that cannot be written would still let somebody in.
    if args.file != "-" && !args.force && path.exists() {
        return Err(Failure::new(format_args!("{} exists already", path.display()))
            .next("name another file, or add --force to replace it"));
    }
    let seconds = args.expires.0.as_secs();
    if seconds == 0 || args.expires > skein_api::TOKEN_EXPIRES_MAX {
        return Err(Failure::usage(format_args!("--expires {} is out of range", args.expires))
            .because(format_args!("it must be 1s to {}", skein_api::TOKEN_EXPIRES_MAX)));
    }
    let mut client = Client::connect(global).await?;
    let name = match (args.name, &args.grant) {
        (None, None) => name_of(path, &client.get("AccessGrant", "").await?),
        (name, _) => name.unwrap_or_default(),
    };
    let reply = client
        .create_token(CreateTokenRequest {
            uses: args.uses,
            expires_s: seconds,
            cost: args.cost,
            guest: args.guest,
            merge: args.merge,
            name,
            consume: args.consume,
            provide: args.provide,
            transit: false,
            grant: args.grant.unwrap_or_default(),
        })
        .await?;
    for warning in &reply.warnings {
        note(global, format_args!("warning: {warning}"));
    }
    if args.file == "-" {
        return output::print(&reply.token);
    }
    if let Err(failure) = input::write_secret(path, reply.token.as_bytes(), args.force) {
        // Nobody has the token, so nobody should be able to use it.
        if let Err(left) = client.delete("AccessGrant", &reply.grant, true).await {
            note(global, format_args!("warning: token {} remains valid: {left}", reply.grant));
        }
        return Err(failure);
    }
    let created = Created {
        grant: reply.grant,
        file: args.file,
        uses: reply.uses,
        expires_in: Duration::from_secs(reply.expires_s).to_string(),
    };
    if global.quiet && !global.structured() {
        return Ok(());
    }
    output::show(global, &created)
}

/// A name for a grant that tells which file its token is in; empty, for one of the controller's choice, where the file's is no name.
fn name_of(file: &Path, grants: &[Resource]) -> String {
    let stem = file.file_stem().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    if !stem.starts_with(|c: char| c.is_ascii_lowercase()) || !stem.chars().all(is_plain) {
        return String::new();
    }
    free_name(&stem, grants)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Created {
    grant: String,
    file: String,
    uses: u32,
    expires_in: String,
}

impl Show for Created {
    fn table(&self, _: bool) -> String {
        let sites =
            if self.uses == 1 { "one site".to_owned() } else { format!("{} sites", self.uses) };
        format!(
            "Wrote {file}: lets {sites} in, for {expires}. `token list` calls it {grant}.\nTake it there by a safe way and run: skctl link {file}\n",
            file = self.file,
            grant = self.grant,
            expires = self.expires_in,
        )
    }

    fn names(&self) -> Vec<String> {
        vec![self.grant.clone()]
    }
}

async fn list(global: &Global) -> Result<(), Failure> {
    let tokens: Vec<TokenRow> = Client::connect(global).await?.query("tokens").await?;
    output::show(global, &Tokens(tokens))
}

#[derive(Serialize)]
struct Tokens(Vec<TokenRow>);

impl Show for Tokens {
    fn table(&self, wide: bool) -> String {
        if self.0.is_empty() {
            return "No tokens. Make one with: skctl token create FILE\n".to_owned();
        }
        let now = clock::now();
        let rows = self.0.iter().map(|token| {
            [
                token.name.clone(),
                if token.state == "used" { "used up" } else { &token.state }.to_owned(),
                format!("{}/{}", token.used, token.uses),
                if token.state == "valid" {
                    clock::left(&token.expires, now)
                } else {
                    String::new()
                },
                token.cost.to_string(),
                if token.guest { "guest" } else { "member" }.to_owned(),
                redeemers(&token.redeemers, wide),
            ]
        });
        columns(["NAME", "STATE", "USED", "EXPIRES IN", "COST", "AS", "REDEEMED BY"], rows)
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|token| token.name.clone()).collect()
    }
}

fn redeemers(ids: &[String], wide: bool) -> String {
    let shown: Vec<&str> =
        ids.iter().take(if wide { ids.len() } else { 2 }).map(|id| short(id, wide)).collect();
    let more = ids.len() - shown.len();
    if more == 0 { shown.join(",") } else { format!("{},+{more}", shown.join(",")) }
}

async fn delete(global: &Global, args: Delete) -> Result<(), Failure> {
    let mut client = Client::connect(global).await?;
    let tokens: Vec<TokenRow> = client.query("tokens").await?;
    let mut grants = client.get("AccessGrant", "").await?.into_iter();
    if !tokens.iter().any(|token| token.name == args.name)
        && !grants.any(|grant| grant.name() == args.name)
    {
        return Err(Failure::new(format_args!("there is no token {:?}", args.name))
            .next("see `skctl token list`"));
    }
    let notes = client.delete("AccessGrant", &args.name, true).await?;
    note(global, format_args!("Token {} can no longer be used.", args.name));
    for text in notes {
        note(global, text);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_called_like_its_file_if_that_is_a_name() {
        for (file, name) in [
            ("branch.token", "branch"),
            ("/tmp/Fleet", "fleet"),
            ("a.b.token", "a-b"),
            ("7.token", ""),
            ("é.token", ""),
            ("-", ""),
            ("-x.token", ""),
        ] {
            assert_eq!(name_of(Path::new(file), &[]), name, "{file}");
        }
    }
}
