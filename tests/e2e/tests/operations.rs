//! What an operator does to a site, and what a machine does to it: upgrades, back-ups, disks that are full, read-only or
//! somebody else's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::topology::Hub;
use skein_e2e::{Site, flow};
use skein_lab::{Host, Lab};

#[test]
fn an_upgrade_of_a_transit_keeps_its_flows() -> Result<()> {
    let net = Hub::new()?;
    let _server = flow::serve(net.dc.host(), 7970, &[])?;
    net.dc.expose("kept", 7970, &[])?;
    let to = net.branch.endpoint("kept", 7970)?;
    let running = flow::start_open(net.branch.host(), to, 20, &[])?;
    let before = net.hub.processes()?;
    net.hub.skctl(&["upgrade"]).check()?;
    let after = net.hub.processes()?;
    ensure!(after.controller != before.controller, "the controller was not replaced");
    ensure!(after.router != before.router, "the router was not replaced");
    net.hub.wait_links_up(2)?;
    flow::clean(&flow::stop(running)?)
}

#[test]
fn a_lost_site_is_rebuilt_from_its_identity() -> Result<()> {
    let net = Hub::new()?;
    let dc = &net.dc;
    let write = |name: &str, content: &str| -> Result<String> {
        let path = dc.host().dir().join(name);
        std::fs::write(&path, content)?;
        Ok(path.to_str().context("a path in UTF-8")?.to_owned())
    };
    let (right, wrong) = (write("right", "correct horse\n")?, write("wrong", "battery staple\n")?);
    let archive = dc.host().dir().join("dc.identity");
    let archive = archive.to_str().context("a path in UTF-8")?;
    dc.skctl(&["identity", "export", archive, "--passphrase-file", &right]).check()?;
    let id = |status: Value| status["siteId"].as_str().map(str::to_owned);
    let before = id(dc.status()?).context("a site id")?;
    let rebuild = |passphrase: &str| {
        ["init", "dc", "--service", "none", "--identity", archive, "--passphrase-file", passphrase]
            .map(str::to_owned)
    };
    fn refs(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    // A site that is there is not replaced.
    dc.refuses(&refs(&rebuild(&right)), 1, &["already"])?;
    dc.host().power_cut()?;
    std::fs::remove_dir_all(dc.host().dir().join("skein/default"))?;
    dc.refuses(&refs(&rebuild(&wrong)), 1, &["passphrase"])?;
    dc.skctl(&refs(&rebuild(&right))).check()?;
    ensure!(id(dc.status()?).as_ref() == Some(&before), "another site was made");
    // Others know it already.
    dc.link(&net.hub.token("rebuilt", &[])?, &[])?;
    dc.wait_links_up(1)?;
    Ok(())
}

fn mount(site: &Site, args: &[&str]) -> Result<()> {
    site.host().command("mount").args(args).check()?;
    Ok(())
}

#[test]
fn a_full_disk_changes_nothing_and_stops_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("small")?;
    let home = host.dir().join("skein");
    std::fs::create_dir_all(&home)?;
    let home = home.to_str().context("a path in UTF-8")?;
    // As large as the programs need.
    let need = std::fs::metadata(skein_e2e::skctl())?.len() + (16 << 20);
    host.command("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={need},mode=700"), "tmpfs", home])
        .check()?;
    let site = Site::init(&host, &["--listen", "127.0.0.1:7443"])?;
    site.expose("before", 5432, &[])?;
    let fill = format!("{home}/fill");
    let filled = host.command("dd").args(["if=/dev/zero", &format!("of={fill}"), "bs=4k"]).run()?;
    ensure!(filled.stderr.contains("No space left"), "{filled}");
    let before = site.skctl(&["export"]).check()?.stdout;
    site.refuses(&["expose", "after", "--port", "80"], 1, &["disk is full"])?;
    let token = host.dir().join("a.token");
    let token = token.to_str().context("a path in UTF-8")?;
    site.refuses(&["token", "create", token], 1, &["disk is full"])?;
    ensure!(site.skctl(&["export"]).check()?.stdout == before, "something was applied");
    site.skctl(&["stop"]).check()?;
    let left = host.command("pgrep").args(["-af", "bin/skein-"]).run()?.stdout;
    ensure!(left.is_empty(), "stop left behind: {left}");
    host.command("rm").arg(&fill).check()?;
    site.skctl(&["start"]).check()?;
    ensure!(site.skctl(&["export"]).check()?.stdout == before, "something was lost");
    // Nor does it prevent the end.
    host.command("dd").args(["if=/dev/zero", &format!("of={fill}"), "bs=4k"]).run()?;
    site.skctl(&["delete", "--yes"]).check()?;
    let left = host.command("ls").arg(format!("{home}/default")).run()?;
    ensure!(left.code != Some(0), "state is left behind: {left}");
    Ok(())
}

#[test]
fn a_read_only_disk_and_a_foreign_owner_are_named() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("odd")?;
    let home = host.dir().join("skein");
    std::fs::create_dir_all(&home)?;
    let home = home.to_str().context("a path in UTF-8")?;
    host.command("mount").args(["-t", "tmpfs", "-o", "mode=700", "tmpfs", home]).check()?;
    let site = Site::init(&host, &["--listen", "127.0.0.1:7443"])?;
    site.skctl(&["stop"]).check()?;
    mount(&site, &["-o", "remount,ro", home])?;
    site.refuses(&["start"], 1, &["read-only"])?;
    site.refuses(&["init"], 1, &["read-only"])?;
    mount(&site, &["-o", "remount,rw", home])?;
    let state = format!("{home}/default");
    host.command("chown").args(["12345", &state]).check()?;
    site.refuses(&["start"], 1, &["belongs to user 12345"])?;
    host.command("chown").args(["0", &state]).check()?;
    site.skctl(&["start"]).check()?;
    site.processes()?;
    Ok(())
}

/// Every way in which a dump could hold these bytes.
fn shapes(secret: &[u8]) -> [Vec<u8>; 4] {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let base64 = |alphabet: &[u8; 64]| -> Vec<u8> {
        let whole = secret.chunks_exact(3).flat_map(|chunk| {
            let bits = u32::from_be_bytes([0, chunk[0], chunk[1], chunk[2]]);
            [18, 12, 6, 0].map(|shift| alphabet[(bits >> shift) as usize & 63])
        });
        whole.collect()
    };
    const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    [secret.to_vec(), hex.into_bytes(), base64(STANDARD), base64(URL)]
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// The first text under this name, however deep.
fn text_of<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    let fields = value.as_object()?;
    let own = fields.get(name).and_then(Value::as_str);
    own.or_else(|| fields.values().find_map(|inner| text_of(inner, name)))
}

/// The secret files of a site: the keys themselves, in runs that are long enough to be nothing else.
fn secrets(host: &Host) -> Result<Vec<(String, Vec<u8>)>> {
    let state = host.dir().join("skein/default");
    let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
    let mut out = vec![
        ("identity.key".to_owned(), read(&state.join("identity.key"))?),
        ("site.secret".to_owned(), read(&state.join("site.secret"))?),
    ];
    let ca: Value = serde_json::from_slice(&read(&state.join("ca.json"))?)?;
    let key = text_of(&ca, "key").context("the key of the CA")?;
    out.push(("ca.json".to_owned(), key.as_bytes().to_vec()));
    for entry in std::fs::read_dir(state.join("router"))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains("key") {
            out.push((name, read(&entry.path())?));
        }
    }
    Ok(out)
}

#[test]
fn a_dump_of_a_real_site_has_no_secrets() -> Result<()> {
    let net = Hub::new()?;
    let token = std::fs::read_to_string(net.hub.token("open", &[])?)?;
    let archive = net.hub.host().dir().join("dump.json");
    let file = archive.to_str().context("a path in UTF-8")?;
    net.hub.skctl(&["debug", "dump", file]).check()?;
    net.hub.refuses(&["debug", "dump", file], 1, &["exists already"])?;
    let dump = std::fs::read(&archive)?;
    ensure!(contains(&dump, b"branch"), "the dump says nothing");
    let body = token.lines().find(|line| line.len() > 40).context("the body of the token")?;
    let half = &body.as_bytes()[body.len() / 2..];
    for line in token.lines().filter(|line| line.len() > 20) {
        ensure!(!contains(&dump, line.as_bytes()), "a token is in the dump");
    }
    ensure!(!contains(&dump, half), "half a token is in the dump");
    let found = secrets(net.hub.host())?;
    ensure!(found.len() >= 4, "the router's key is not where this test looks");
    for (name, secret) in found {
        // The last bytes are the key in each of the forms; the first may be a header that is public.
        let tail = &secret[secret.len().saturating_sub(24)..];
        for shape in shapes(tail) {
            ensure!(!contains(&dump, &shape), "{name} is in the dump");
        }
    }
    Ok(())
}

#[test]
fn watching_outlives_the_controller() -> Result<()> {
    let lab = Lab::new()?;
    let site = Site::init(&lab.host("watched")?, &["--listen", "127.0.0.1:7443"])?;
    site.expose("first", 8001, &[])?;
    let watching = site.skctl(&["get", "connector", "-w"]).spawn()?;
    watching.wait_for("connector/first", Duration::from_secs(10))?;
    site.skctl(&["restart"]).check()?;
    site.expose("second", 8002, &[])?;
    watching.wait_for("connector/second", Duration::from_secs(20))?;
    let added = watching.stdout().lines().filter(|line| line.starts_with("added")).count();
    ensure!(added == 2, "what was known is told again: {}", watching.stdout());
    // A variable that is set to nothing names no namespace.
    site.host().command(skein_e2e::skctl()).env("SKEIN_NAMESPACE", "").arg("status").check()?;
    // Quiet is quiet.
    let output = site.skctl(&["init", "-q"]).check()?;
    ensure!(output.stdout.is_empty() && output.stderr.is_empty(), "{output}");
    Ok(())
}

#[test]
fn the_doctor_looks_at_clocks_and_certificates() -> Result<()> {
    let net = Hub::new()?;
    let findings = net.branch.json(&["doctor"]).or_else(|_| {
        // Socket buffers of the machine may be small; that is a finding, and not what this is about.
        let output = net.branch.skctl(&["doctor", "-o", "json"]).run()?;
        serde_json::from_str::<Value>(&output.stdout).with_context(|| output.to_string())
    })?;
    let find = |check: &str| -> Result<&Value> {
        let mut all = findings.as_array().into_iter().flatten();
        all.find(|finding| finding["check"] == check).with_context(|| findings.to_string())
    };
    for check in ["clock", "router certificate", "certificate authority"] {
        ensure!(find(check)?["ok"] == true, "{findings}");
    }
    let clock = find("clock")?["detail"].to_string();
    ensure!(clock.contains("hub"), "nobody told the time: {clock}");
    Ok(())
}
