//! The life of a site on its host: the ends that are not the regular one, and what is left after them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::{
    Site, flow,
    topology::{internet, reachable},
};
use skein_lab::{Host, Lab, Signal, eventually};

/// One host with one site that listens.
fn lone() -> Result<(Lab, Site)> {
    let lab = Lab::new()?;
    let site = Site::init(&lab.host("lone")?, &["--listen", "127.0.0.1:7443"])?;
    site.processes()?;
    Ok((lab, site))
}

/// Processes of any site on the host.
fn running(host: &Host) -> Result<String> {
    Ok(host.command("pgrep").args(["-af", "bin/skein-"]).run()?.stdout)
}

fn nothing_left(host: &Host) -> Result<()> {
    let left = running(host)?;
    ensure!(left.is_empty(), "processes are left behind: {left}");
    let state = std::fs::read_dir(host.dir().join("skein"))?.flatten().count();
    ensure!(state == 0, "state is left behind");
    let hosts = std::fs::read_to_string(host.dir().join("hosts"))?;
    ensure!(!hosts.contains("skein"), "a block is left behind: {hosts}");
    Ok(())
}

fn state(site: &Site) -> std::path::PathBuf {
    site.host().dir().join("skein/default")
}

#[test]
fn ctrl_c_in_the_foreground_ends_the_router_too() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("fore")?;
    // Once while it starts, once when all runs: the site of the first attempt is there then, and the options count.
    for (round, name) in ["early", "late"].into_iter().enumerate() {
        let init = host.command(skein_e2e::skctl()).args([
            "init",
            "fore",
            "--foreground",
            "--listen",
            "127.0.0.1:7443",
            "--advertise",
            name,
        ]);
        let process = init.spawn()?;
        if round == 0 {
            eventually("the controller is there", Duration::from_secs(20), || {
                Ok(running(&host)?.contains("skein-controller"))
            })?;
        } else {
            let status = || host.command(skein_e2e::skctl()).args(["status", "-o", "json"]).run();
            eventually("the site is up", Duration::from_secs(20), || {
                Ok(status()?.stdout.contains("\"attached\""))
            })?;
            let told = status()?.stdout;
            ensure!(told.contains("late:7443"), "options of a site that is there: {told}");
        }
        process.interrupt()?;
        let output = process.finish(Duration::from_secs(40))?;
        let left = running(&host)?;
        ensure!(left.is_empty(), "{name}: left behind: {left} {output}");
        if round == 1 {
            ensure!(output.code == Some(0), "{output}");
        }
    }
    Ok(())
}

#[test]
fn stop_and_delete_find_processes_that_do_not_answer() -> Result<()> {
    let (_lab, site) = lone()?;
    let host = site.host();
    // A router without its controller, and a controller that does not answer.
    for frozen in [false, true] {
        let processes = site.processes()?;
        if frozen {
            host.signal(processes.controller, Signal::Freeze)?;
        } else {
            host.signal(processes.router, Signal::Freeze)?;
            host.signal(processes.controller, Signal::Kill)?;
        }
        site.skctl(&["stop"]).timeout(Duration::from_secs(100)).check()?;
        let left = running(host)?;
        ensure!(left.is_empty(), "stop left behind: {left}");
        site.skctl(&["start"]).check()?;
    }
    // `restart` without a controller restarts the router.
    let before = site.processes()?;
    host.signal(before.router, Signal::Freeze)?;
    host.signal(before.controller, Signal::Kill)?;
    site.skctl(&["restart"]).timeout(Duration::from_secs(100)).check()?;
    ensure!(site.processes()?.router != before.router, "the old router runs on");

    let processes = site.processes()?;
    host.signal(processes.router, Signal::Freeze)?;
    host.signal(processes.controller, Signal::Kill)?;
    site.skctl(&["delete", "--yes"]).timeout(Duration::from_secs(100)).check()?;
    nothing_left(host)
}

#[test]
fn a_delete_that_was_interrupted_is_repeated() -> Result<()> {
    let (_lab, site) = lone()?;
    site.skctl(&["stop"]).check()?;
    // What an older attempt may have removed already.
    std::fs::remove_file(state(&site).join("identity.key"))?;
    std::fs::remove_dir_all(state(&site).join("resources"))?;
    site.skctl(&["delete", "--yes"]).check()?;
    nothing_left(site.host())?;
    site.refuses(&["delete", "--yes"], 1, &["there is no site"])?;
    Ok(())
}

#[test]
fn sockets_that_were_removed_come_back() -> Result<()> {
    let (_lab, site) = lone()?;
    let before = site.processes()?;
    std::fs::remove_dir_all(state(&site).join("run"))?;
    eventually("the controller is reachable again", Duration::from_secs(10), || {
        Ok(site.skctl(&["status"]).run()?.code == Some(0))
    })?;
    ensure!(site.processes()? == before, "a process was replaced");
    site.skctl(&["stop"]).check()?;
    ensure!(running(site.host())?.is_empty());
    Ok(())
}

#[test]
fn damage_is_named_until_somebody_has_dealt_with_it() -> Result<()> {
    let (_lab, site) = lone()?;
    site.expose("db", 5432, &[])?;
    let token = site.token("one", &[])?;
    ensure!(token.exists());
    site.skctl(&["stop"]).check()?;
    let state = state(&site);
    let grant = file_in(&state.join("grants"))?;
    let endorsement = state.join("trust/endorsed").join(format!("{}.json", "a".repeat(52)));
    let damaged =
        [state.join("resources/connector.db.yaml"), grant, endorsement, state.join("host.json")];
    for path in &damaged {
        std::fs::write(path, "not what it was")?;
    }
    // None of these may touch anything: there is no controller.
    for args in [&["logs"][..], &["status"], &["get", "Connector"]] {
        site.skctl(args).run()?;
    }
    for path in &damaged {
        ensure!(std::fs::read(path)? == b"not what it was", "{} was touched", path.display());
    }
    site.skctl(&["start"]).check()?;
    for restart in [false, true] {
        if restart {
            site.skctl(&["restart"]).check()?;
        }
        let shown = site.skctl(&["status"]).check()?.stdout;
        for path in &damaged {
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?;
            ensure!(shown.contains(name), "{name} is not named (restart: {restart}): {shown}");
        }
    }
    Ok(())
}

fn file_in(dir: &Path) -> Result<std::path::PathBuf> {
    let entry = std::fs::read_dir(dir)?.next().context("a file")??;
    Ok(entry.path())
}

#[test]
fn etc_hosts_is_kept_and_restored() -> Result<()> {
    let (_lab, site) = lone()?;
    let hosts = site.host().dir().join("hosts");
    let before = std::fs::read_to_string(&hosts)?;
    site.expose("db", 5432, &[])?;
    let named = || {
        eventually("the address is named", Duration::from_secs(10), || {
            Ok(std::fs::read_to_string(&hosts)?.contains(" db\n"))
        })
    };
    site.skctl(&["init", "--manage-hosts"]).check()?;
    named()?;
    site.skctl(&["init", "--manage-hosts=false"]).check()?;
    eventually("the block is gone", Duration::from_secs(10), || {
        Ok(std::fs::read_to_string(&hosts)? == before)
    })?;
    site.skctl(&["init", "--manage-hosts"]).check()?;
    named()?;
    // Also where nobody answers any more.
    site.host().signal(site.processes()?.router, Signal::Kill)?;
    site.host().signal(site.processes()?.controller, Signal::Kill)?;
    site.skctl(&["delete", "--yes"]).check()?;
    ensure!(std::fs::read_to_string(&hosts)? == before);
    nothing_left(site.host())
}

#[test]
fn names_of_others_are_written_once_they_are_known_to_lead_nowhere() -> Result<()> {
    let (lab, internet) = internet()?;
    let hub = reachable(&lab, &internet, "hub")?;
    let leaf = lab.host("leaf")?;
    leaf.join(&internet)?;
    let hosts = leaf.dir().join("hosts");
    let before = std::fs::read_to_string(&hosts)? + "192.0.2.9 Printer\n";
    std::fs::write(&hosts, &before)?;
    let leaf = Site::init(&leaf, &["--manage-hosts"])?;
    leaf.link_to(&hub, &[])?;
    let _server = flow::serve(hub.host(), 5432, &[])?;
    for name in ["leaf", "metadata", "printer", "zebra"] {
        hub.expose(name, 5432, &[])?;
    }
    eventually("the address is named", Duration::from_secs(30), || {
        Ok(std::fs::read_to_string(&hosts)?.contains(" zebra\n"))
    })?;
    let after = std::fs::read_to_string(&hosts)?;
    ensure!(after.starts_with(&before) && after.lines().count() == before.lines().count() + 3);
    Ok(())
}

#[test]
fn start_installs_nothing_over_what_is_installed() -> Result<()> {
    let (_lab, site) = lone()?;
    let program = state(&site).join("bin/skein-router");
    let inode = || -> Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(std::fs::metadata(&program)?.ino())
    };
    let before = inode()?;
    site.skctl(&["restart"]).check()?;
    site.skctl(&["stop"]).check()?;
    site.skctl(&["start"]).check()?;
    site.skctl(&["init"]).check()?;
    ensure!(inode()? == before, "a program was replaced without `upgrade`");
    site.skctl(&["upgrade"]).check()?;
    ensure!(inode()? != before, "`upgrade` replaced nothing");
    Ok(())
}

#[test]
fn what_drains_is_reset_also_by_the_next_controller() -> Result<()> {
    let (_lab, site) = lone()?;
    let host = site.host();
    let _server = flow::serve(host, 8200, &[])?;
    site.expose("db", 8200, &[])?;
    let to = site.endpoint("db", 8200)?;
    let flow = flow::start(host, "hold", to, &["--flows", "1"])?;
    let active = |wanted: u64| {
        eventually("the flow is seen", Duration::from_secs(15), || {
            Ok(site.status()?["routers"][0]["flowsActive"].as_u64() == Some(wanted))
        })
    };
    active(1)?;
    site.skctl(&["unexpose", "db"]).check()?;
    host.signal(site.processes()?.controller, Signal::Kill)?;
    eventually("another controller runs", Duration::from_secs(20), || {
        Ok(site.skctl(&["status"]).run()?.code == Some(0))
    })?;
    active(1)?;
    site.skctl(&["unexpose", "db", "--now"]).check()?;
    active(0)?;
    drop(flow);
    site.refuses(&["unexpose", "other", "--now"], 1, &["not served from here"])?;
    Ok(())
}

#[test]
fn a_service_manager_that_is_not_there_strands_nobody() -> Result<()> {
    let (_lab, site) = lone()?;
    let before = site.processes()?;
    site.refuses(&["init", "--service", "systemd"], 1, &["systemd", "--service none"])?;
    // What runs the processes is what is recorded, whatever the resource says by now.
    let manifest = site.skctl(&["get", "site", "-o", "yaml"]).check()?.stdout;
    let path = site.host().dir().join("site.yaml");
    std::fs::write(&path, manifest.replace("service: none", "service: auto"))?;
    site.skctl(&["apply", "-f"]).arg(&path).check()?;
    site.skctl(&["init"]).check()?;
    ensure!(site.processes()? == before, "the site was restarted");
    site.skctl(&["stop"]).check()?;
    ensure!(running(site.host())?.is_empty(), "stop looked elsewhere");
    Ok(())
}

#[test]
fn a_second_site_of_a_host_listens_on_the_next_port() -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.host("shared")?;
    let listens = |site: &Site| -> Result<String> {
        let status = site.status()?;
        let socket = &status["routers"][0]["sockets"][0];
        ensure!(socket["error"] == "", "{status}");
        ensure!(status["problems"].as_array().is_some_and(Vec::is_empty), "{status}");
        Ok(socket["address"].as_str().unwrap_or_default().to_owned())
    };
    for (namespace, port) in [("first", 7443), ("second", 7444), ("third", 7445)] {
        let site = Site::init_in(&host, namespace, &[])?;
        let address = listens(&site)?;
        ensure!(address.ends_with(&format!(":{port}")), "{namespace} listens at {address}");
    }
    Ok(())
}

#[test]
fn what_a_change_says_is_of_what_was_changed() -> Result<()> {
    let (_lab, site) = lone()?;
    let _server = flow::serve(site.host(), 8400, &[])?;
    let said = |args: &[&str]| Ok::<_, anyhow::Error>(site.skctl(args).check()?.stderr);
    let problems = || Ok::<_, anyhow::Error>(site.status()?["problems"].to_string());
    for _ in 0..3 {
        let good = said(&["expose", "changing", "--port", "80:8400"])?;
        ensure!(!good.contains("warning"), "{good}");
        ensure!(!problems()?.contains("changing"), "{}", problems()?);
        let bad = said(&["expose", "changing", "--port", "80:8401"])?;
        ensure!(bad.contains("warning: no target answers: 127.0.0.1:8401"), "{bad}");
        ensure!(problems()?.contains("changing is not served from here"), "{}", problems()?);
    }
    said(&["expose", "changing", "--port", "80:8400"])?;
    let good = said(&["listen", "changing", "--port", "80:8402"])?;
    ensure!(good.contains("listens on 127.0.0.1:8402"), "{good}");
    let bad = said(&["listen", "changing", "--port", "80:8400"])?;
    ensure!(bad.contains("warning: port 80: 127.0.0.1:8400 is held by"), "{bad}");
    ensure!(problems()?.contains("changing has no endpoint at 127.0.0.1"), "{}", problems()?);
    Ok(())
}
