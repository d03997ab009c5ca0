//! Wrong input gets an error that says what to do, and loses nothing.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::topology::{Hub, internet, reachable};
use skein_e2e::{Site, figure, flow};
use skein_lab::{Host, Lab, Lan, eventually, require_programs};

/// A reachable site and one that is not linked to it yet.
fn hub_and_stranger() -> Result<(Lab, Lan, [Site; 2])> {
    let (lab, internet) = internet()?;
    let hub = reachable(&lab, &internet, "hub")?;
    let stranger = Site::init(&lab.host_behind_nat("stranger", &internet)?, &[])?;
    Ok((lab, internet, [hub, stranger]))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

/// Writes a file on the host and gives its path.
fn file(host: &Host, name: &str, content: impl AsRef<[u8]>) -> Result<String> {
    let path = host.dir().join(name);
    std::fs::write(&path, content)?;
    Ok(text(&path)?.to_owned())
}

#[test]
fn tokens_that_are_no_good() -> Result<()> {
    let (lab, internet, [hub, site]) = hub_and_stranger()?;
    let good = hub.token("good", &[])?;
    let token = std::fs::read_to_string(&good)?;
    let bad = |name: &str, content: &str| file(site.host(), name, content);
    let link =
        |path: &str, words: &[&str]| site.refuses(&["link", path, "--timeout", "15s"], 1, words);

    let cut = &token[..token.len() * 2 / 3];
    link(&bad("cut", cut)?, &["cut short"])?;
    let body = token.lines().find(|line| line.len() > 40).context("a body")?;
    link(&bad("damaged", &token.replace(body, &body.to_uppercase()))?, &["damaged"])?;
    link(
        &bad("future", &token.replace("SKEIN-TOKEN-1", "SKEIN-TOKEN-7"))?,
        &["version", "upgrade"],
    )?;
    let foreign = "apiVersion: skupper.io/v2alpha1\nkind: AccessToken\nmetadata: {name: x}\n";
    link(&bad("foreign", foreign)?, &["not a skein token", "token create"])?;
    let pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
    link(&bad("pem", pem)?, &["not a skein token"])?;
    link(&bad("empty", "")?, &["empty"])?;
    link(&bad("huge", &"x".repeat(1 << 20))?, &["more than"])?;
    site.refuses(&["link", "/no/such/file"], 1, &["/no/such/file"])?;
    let literal = site.refuses(&["link", token.trim()], 2, &["file"])?;
    ensure!(!literal.contains(body), "the error repeats the secret");

    let short = hub.token("short", &["--expires", "1s"])?;
    let row = |state: &str| -> Result<bool> {
        let rows = hub.json(&["token", "list"])?;
        Ok(rows.as_array().into_iter().flatten().any(|row| row["state"] == state))
    };
    eventually("it has expired", Duration::from_secs(30), || row("expired"))?;
    link(text(&short)?, &["expired", "token create"])?;

    site.link(&good, &[])?;
    let second = Site::init(&lab.host_behind_nat("second", &internet)?, &[])?;
    second.refuses(&["link", text(&good)?, "--timeout", "15s"], 1, &["used"])?;
    hub.refuses(&["link", text(&hub.token("own", &[])?)?], 1, &["this very site"])?;
    // Nothing of this has broken the link that was made.
    site.wait_links_up(1)?;
    Ok(())
}

#[test]
fn endpoints_that_are_not_there_or_something_else() -> Result<()> {
    if !require_programs(&["nginx"]) {
        return Ok(());
    }
    let (lab, internet) = internet()?;
    let host = lab.host("hub")?;
    let address = host.join(&internet)?.to_string();
    let site = Site::init(&lab.host_behind_nat("site", &internet)?, &[])?;
    let token_to = |namespace: &str, advertise: &str| -> Result<String> {
        let skctl = |args: &[&str]| {
            host.command(skein_e2e::skctl()).args(["-n", namespace]).args(args).check()
        };
        skctl(&["init", namespace, "--service", "none", "--advertise", advertise])?;
        let path = host.dir().join(format!("{namespace}.token"));
        skctl(&["token", "create", text(&path)?])?;
        Ok(text(&path)?.to_owned())
    };
    let link = |token: &str, code, words: &[&str]| {
        site.refuses(&["link", token, "--timeout", "30s"], code, words)
    };
    // Nothing there, and a port nobody listens on.
    let nowhere = token_to("nowhere", "203.0.113.99:7443")?;
    let output = site.skctl(&["link", &nowhere, "--timeout", "30s"]).run()?;
    ensure!(output.code == Some(3) || output.code == Some(1), "{output}");
    ensure!(output.stderr.contains("203.0.113.99:7443"), "{output}");
    // Whoever is impatient still learns what became of each endpoint.
    site.refuses(&["link", &nowhere, "--timeout", "3s"], 3, &["203.0.113.99:7443", "unanswered"])?;
    link(&token_to("closed", &format!("{address}:9"))?, 1, &["refused"])?;
    // A web server.
    let (_nginx, _) = skein_e2e::servers::nginx_on(&host, &address, 8080)?;
    link(&token_to("web", &format!("{address}:8080"))?, 1, &["8080"])?;
    Ok(())
}

#[test]
fn documents_that_are_no_good_change_nothing() -> Result<()> {
    let (_lab, _, [hub, _]) = hub_and_stranger()?;
    let before = hub.skctl(&["export"]).check()?.stdout;
    let connector = |name: &str, spec: &str| {
        format!(
            "apiVersion: skein.dev/v1alpha1\nkind: Connector\nmetadata: {{name: {name}}}\nspec: {spec}\n"
        )
    };
    let fine = connector("fine", "{address: fine, host: 127.0.0.1, ports: [{port: 80}]}");
    let long = "x".repeat(300);
    let bad = [
        (
            "field",
            connector("a", "{address: a, host: h, ports: [{port: 80}], colour: red}"),
            "colour",
        ),
        ("type", connector("a", "{address: a, host: h, ports: eighty}"), "ports"),
        ("port-zero", connector("a", "{address: a, host: h, ports: [{port: 0}]}"), "port"),
        ("port-high", connector("a", "{address: a, host: h, ports: [{port: 70000}]}"), "port"),
        ("long", connector(&long, "{address: a, host: h, ports: [{port: 80}]}"), "name"),
        ("emoji", connector("🦀", "{address: a, host: h, ports: [{port: 80}]}"), "name"),
        ("dots", connector("../x", "{address: a, host: h, ports: [{port: 80}]}"), "name"),
        ("kind", fine.replace("Connector", "Connexion"), "Connexion"),
        ("version", fine.replace("v1alpha1", "v9"), "v9"),
        ("twice", format!("{fine}---\n{fine}"), "fine"),
        ("big", format!("# {}\n{fine}", "x".repeat(10 << 20)), "bytes"),
        ("bytes", "\u{1}\u{2}{{{{".to_owned(), ""),
    ];
    for (name, content, word) in bad {
        // All or nothing: the good document goes with the bad one.
        let content =
            if matches!(name, "twice" | "big") { content } else { format!("{fine}---\n{content}") };
        let path = file(hub.host(), &format!("{name}.yaml"), content)?;
        let output = hub.skctl(&["apply", "-f", &path]).run()?;
        ensure!(matches!(output.code, Some(1 | 2)), "{name}: {output}");
        ensure!(output.stderr.starts_with("error: "), "{name}: {output}");
        ensure!(output.stderr.contains(word), "{name} does not mention {word}: {output}");
    }
    for args in [
        &["expose", "a", "--port", "0"][..],
        &["expose", "a", "--port", "70000"],
        &["expose", "a", "--port", "http"],
        &["expose", "../a", "--port", "80"],
        &["expose", "🦀", "--port", "80"],
        &["expose", &long, "--port", "80"],
        &["nonsense"],
    ] {
        let output = hub.skctl(args).run()?;
        ensure!(matches!(output.code, Some(1 | 2)), "{args:?}: {output}");
        ensure!(output.stderr.starts_with("error: "), "{args:?}: {output}");
    }
    ensure!(hub.skctl(&["export"]).check()?.stdout == before, "something was applied");
    Ok(())
}

#[test]
fn a_target_that_does_not_resolve_is_tried_again() -> Result<()> {
    let net = Hub::new()?;
    net.dc.expose("later", 8200, &["--target", "db.internal"])?;
    let _server = flow::serve(net.dc.host(), 8200, &[])?;
    let before = net.dc.processes()?;
    let hosts = net.dc.host().dir().join("hosts");
    let with = format!("{}127.0.0.1 db.internal\n", std::fs::read_to_string(&hosts)?);
    std::fs::write(&hosts, with)?;
    let to = net.branch.endpoint("later", 8200)?;
    let report = flow::run(net.branch.host(), "probe", to, &["--count", "3"])?;
    ensure!(report["ok"] == 3, "{report}");
    ensure!(net.dc.processes()? == before, "a process died of a name");
    Ok(())
}

#[test]
fn a_damaged_state_file_is_named_and_never_overwritten() -> Result<()> {
    let (_lab, _, [hub, _]) = hub_and_stranger()?;
    hub.skctl(&["stop"]).check()?;
    let state = hub.host().dir().join("skein/default");
    for name in ["ca.json", "site.json", "identity.key"] {
        let path = state.join(name);
        let good = std::fs::read(&path)?;
        std::fs::write(&path, "not what it was")?;
        let output = hub.skctl(&["start"]).run()?;
        ensure!(output.code == Some(1) && output.stderr.contains(name), "{name}: {output}");
        let kept = std::fs::read_dir(&state)?.flatten().any(|entry| {
            std::fs::read(entry.path()).is_ok_and(|content| content == b"not what it was")
        });
        ensure!(kept, "{name} was overwritten");
        std::fs::write(&path, good)?;
    }
    hub.skctl(&["start"]).check()?;
    hub.processes()?;
    Ok(())
}

#[test]
fn random_bytes_on_the_port_are_dropped() -> Result<()> {
    let net = Hub::new()?;
    let router = net.hub.processes()?.router;
    let before = net.hub.usage(router)?;
    let to = net.hub.host().address();
    let script = format!(
        "for i in $(seq 300); do
           head -c 1200 /dev/urandom > /dev/udp/{to}/7443
           (head -c 70000 /dev/urandom > /dev/tcp/{to}/7443) 2> /dev/null
         done; true"
    );
    let gateway = net.branch.host().gateway().context("a gateway")?;
    gateway.command("bash").args(["-c", &script]).check()?;
    net.branch.wait_links_up(1)?;
    ensure!(net.hub.processes()?.router == router, "the router died");
    eventually("every connection is closed", Duration::from_secs(20), || {
        Ok(net.hub.usage(router)?.descriptors <= before.descriptors + 2)
    })?;
    let after = net.hub.usage(router)?;
    figure("router before and after random bytes", format!("{before:?} {after:?}"));
    ensure!(after.rss_kib < before.rss_kib + (8 << 10), "{before:?} {after:?}");
    Ok(())
}
