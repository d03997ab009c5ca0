//! The program against a controller made for the test: requests, output, exit codes.
//!
//! `SKEIN_BLESS=1 cargo test -p skctl` writes the expected output in `tests/golden/` anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod fake;

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Output};

use fake::Fake;
use skein_api::{Code, Token, to_yaml};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn ok(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Standard error of a command that must end with `code`.
#[track_caller]
fn fails(output: &Output, code: i32) -> String {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}{}", text(&output.stdout));
    error
}

#[track_caller]
fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("SKEIN_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, actual).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "{}", path.display());
}

#[test]
fn documents_in_every_format() {
    let fake = Fake::start();
    let commands: [(&str, &[&str]); 8] = [
        ("status", &["status"]),
        ("network", &["network", "status"]),
        ("links", &["link", "list"]),
        ("services", &["service", "list"]),
        ("tokens", &["token", "list"]),
        ("trace", &["trace", "web.prod:80"]),
        ("get", &["get", "all"]),
        ("version", &["version"]),
    ];
    for (name, args) in commands {
        for format in ["table", "wide", "json", "yaml", "name"] {
            let output = fake.run(&[args, &["-o", format]].concat());
            golden(&format!("{name}.{format}"), &ok(&output));
        }
    }
    golden("services.hosts", &ok(&fake.run(&["service", "list", "-o", "hosts"])));
    golden("export.yaml", &ok(&fake.run(&["export", "-q"])));
}

#[test]
fn failed_checks_fail_the_command() {
    let fake = Fake::start();
    let output = fake.run(&["doctor", "-q"]);
    assert_eq!(fails(&output, 1), "");
    golden("doctor.table", &text(&output.stdout));
    let output = fake.run(&["doctor", "web.prod", "-q"]);
    assert!(text(&output.stdout).starts_with("ok    path to web.prod: leads to dc\n"));
}

#[test]
fn what_get_prints_can_be_applied() {
    let fake = Fake::start();
    let yaml = ok(&fake.run(&["get", "all", "-o", "yaml"]));
    let output = fake.run_with_input(&["apply", "-f", "-", "-o", "name"], yaml.as_bytes());
    assert_eq!(ok(&output), "site/here\nlistener/web\nconnector/db\n");
    assert_eq!(fake.applied(), fake::resources());
}

#[test]
fn hosts_format_belongs_to_services() {
    let fake = Fake::start();
    assert!(fails(&fake.run(&["status", "-o", "hosts"]), 2).contains("service list"));
}

#[test]
fn nothing_from_a_peer_reaches_the_terminal_as_a_command() {
    let fake = Fake::start();
    for args in [&["link", "list"][..], &["network", "status"], &["status"], &["get", "all"]] {
        assert!(!ok(&fake.run(args)).contains('\u{1b}'), "{args:?}");
    }
}

#[test]
fn expose_names_the_connector_after_the_address() {
    let fake = Fake::start();
    let output = fake.run(&[
        "expose",
        "pay.prod",
        "--port",
        "80:8080",
        "--port",
        "53",
        "--target",
        "10.0.0.1",
        "--target",
        "db.lan",
        "--strategy",
        "weighted",
        "--retry",
        "at-least-once",
        "--idle-timeout",
        "5m",
        "--source",
        "site",
        "--proxy-protocol",
        "v2",
    ]);
    assert_eq!(ok(&output), "Serving pay.prod to the network.\n");
    golden("expose-applied.yaml", &to_yaml(&fake.applied()));
    for command in ["expose", "listen"] {
        let refused = fails(&fake.run(&[command, "dns", "--port", "53/sctp"]), 2);
        assert!(refused.contains("tcp and udp are"), "{refused}");
    }
    let no_proxy = ["expose", "dns", "--port", "53/udp", "--proxy-protocol", "v2"];
    let refused = fails(&fake.run(&no_proxy), 2);
    assert!(refused.contains("proxyProtocol") && refused.contains("udp port"), "{refused}");
    let both = ["--port", "53", "--port", "53/tcp", "--protocol", "udp", "-q"];
    ok(&fake.run(&[&["expose", "dns"][..], &both].concat()));
    golden("expose-udp-applied.yaml", &to_yaml(&fake.applied()));
    // An address that is served already keeps its connector.
    ok(&fake.run(&["expose", "db", "--port", "5433", "-q"]));
    assert_eq!(fake.applied()[0].name(), "db");
}

#[test]
fn local_endpoints() {
    let fake = Fake::start();
    ok(&fake.run(&["listen", "db", "--host", "127.0.0.1", "--port", "5432:15432"]));
    golden("listen-applied.yaml", &to_yaml(&fake.applied()));
    ok(&fake.run(&["unlisten", "web.prod"]));
    assert_eq!(fake.deleted(), ["Listener/web"]);
    assert!(fails(&fake.run(&["unlisten", "nothing"]), 1).contains("no explicit endpoint"));
}

#[test]
fn deleting_says_what_remains() {
    let fake = Fake::start();
    let output = fake.run(&["unlink", "hub"]);
    assert_eq!(ok(&output), "");
    assert!(text(&output.stderr).contains("hub remains a member"), "{}", text(&output.stderr));
    ok(&fake.run(&["unexpose", "db"]));
    ok(&fake.run(&["delete", "connector", "db", "--now"]));
    assert_eq!(fake.deleted(), ["Link/hub", "address db", "Connector/db now"]);
    assert!(fails(&fake.run(&["unexpose", "nothing"]), 1).contains("not served from here"));
    let error = fails(&fake.run(&["unlink", "branch"]), 1);
    assert!(error.contains("incoming link") && error.contains("there"), "{error}");
}

#[test]
fn tokens_are_written_private_and_never_over_a_file() {
    let fake = Fake::start();
    let path = fake.dir().join("a.token");
    let file = path.to_str().unwrap();
    assert!(ok(&fake.run(&["token", "create", file])).contains("skctl link"));
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode, fs::read_to_string(&path).unwrap().as_str()), (0o600, fake::TOKEN));
    assert!(fails(&fake.run(&["token", "create", file]), 1).contains("exists already"));
    ok(&fake.run(&["token", "create", file, "--force"]));
    assert_eq!(ok(&fake.run(&["token", "create", "-"])), fake::TOKEN);
    // A token that could not be written is taken back.
    let nowhere = fails(&fake.run(&["token", "create", "/nowhere/a.token"]), 1);
    assert!(
        nowhere.contains("cannot write /nowhere/a.token; directory /nowhere: it does not"),
        "{nowhere}"
    );
    let unknown = fails(&fake.run(&["token", "delete", "nosuch"]), 1);
    assert!(unknown.contains("no token") && unknown.contains("skctl token list"), "{unknown}");
    assert_eq!(fake.deleted(), ["AccessGrant/grant-1 now"]);
}

fn token(name: &str, expires_unix_s: i64) -> String {
    let id = fake::ISSUER;
    let token = Token {
        endpoints: vec!["hub.example:7443".into()],
        issuer: id,
        issuer_name: name.into(),
        ca_sha256: [2; 32],
        code: Code::new(vec![3; 16]).unwrap(),
        network: id,
        expires_unix_s,
        uses: 1,
        cost: 1,
        guest: false,
    };
    token.encode()
}

#[test]
fn linking_shows_progress_and_the_reason_of_a_failure() {
    let fake = Fake::start();
    let link =
        |name: &str| fake.run_with_input(&["link", "-"], token(name, i64::MAX / 2).as_bytes());
    let output = link("hub");
    assert_eq!(ok(&output), "Link hub to site hub is up.\n");
    assert!(text(&output.stderr).contains("waiting for the link …"), "{}", text(&output.stderr));
    assert!(fails(&link("refuses"), 1).contains("error: used up; ask for another"));
    assert!(fails(&link("sleeps"), 3).contains("error: the link is not up"));
    assert!(fails(&link("breaks"), 1).contains("ended before it was done"));
}

#[test]
fn bad_tokens_are_told_apart_before_anybody_is_asked() {
    let fake = Fake::start();
    let good = token("hub", i64::MAX / 2);
    let cases = [
        (String::new(), "empty"),
        (good[..good.len() / 2].to_owned(), "cut short"),
        (good.replace("END ", "END f"), "cut short"),
        (good.replace("-TOKEN-1", "-TOKEN-7"), "upgrade"),
        (token("hub", 0), "expired at 1970-01-01T00:00:00Z"),
        ("apiVersion: skupper.io/v2alpha1\nkind: AccessToken\n".to_owned(), "Skupper"),
        ("-----BEGIN CERTIFICATE-----\n".to_owned(), "PEM"),
        ("{}".to_owned(), "JSON"),
        ("x".repeat(100_000), "more than 16384 bytes"),
    ];
    for (input, reason) in cases {
        let error = fails(&fake.run_with_input(&["link", "-"], input.as_bytes()), 1);
        assert!(error.contains(reason), "{reason}: {error}");
    }
    let error = fails(&fake.run_with_input(&["link", "-"], &[0xff, 0xfe]), 1);
    assert!(error.contains("not text"), "{error}");
    assert!(fails(&fake.run(&["link", "/nowhere"]), 1).contains("cannot read /nowhere"));
    assert!(fails(&fake.run(&["link", "/"]), 1).contains("directory"));
    assert!(fails(&fake.run(&["link", good.as_str()]), 2).contains("process list"));
    assert_eq!(fake.redeemed(), 0);
}

#[test]
fn bad_documents_apply_nothing() {
    let fake = Fake::start();
    let header = "apiVersion: skein.dev/v1alpha1\nkind: Connector\nmetadata: {name: c}\n";
    let huge = "#".repeat(10 * 1024 * 1024);
    let cases = [
        (format!("{header}spec: {{address: a, prots: []}}\n"), "line 4"),
        (format!("{header}spec: {{address: a, ports: [{{port: x}}]}}\n"), "whole number"),
        (format!("{header}spec: {{address: a, ports: [{{port: 0}}]}}\n"), "1 to 65535"),
        ("just text".to_owned(), "line 1"),
        (String::new(), "no documents"),
        (huge, "more than 8388608 bytes"),
    ];
    for (input, reason) in cases {
        let error = fails(&fake.run_with_input(&["apply", "-f", "-"], input.as_bytes()), 1);
        assert!(error.contains(reason), "{reason}: {error}");
    }
    // One bad file among good ones: nothing of either.
    let dir = fake.dir().join("services");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("a.yaml"), format!("{header}spec: {{address: a, ports: [{{port: 1}}]}}\n"))
        .unwrap();
    fs::write(dir.join("b.yaml"), "kind: Nothing\n").unwrap();
    let error = fails(&fake.run(&["apply", "-f", dir.to_str().unwrap()]), 1);
    assert!(error.contains("b.yaml") && error.contains("nothing was applied"), "{error}");
    assert_eq!(fake.applied(), Vec::new());
    fs::remove_file(dir.join("b.yaml")).unwrap();
    let output = fake.run(&["apply", "-f", dir.to_str().unwrap()]);
    assert_eq!(ok(&output), "connector/c created\n");
}

#[test]
fn usage_errors_exit_with_2() {
    let fake = Fake::start();
    let cases: [&[&str]; 14] = [
        &["nonsense"],
        &["expose", "a"],
        &["expose", "a", "--port", "0"],
        &["expose", "a", "--port", "70000"],
        &["expose", "Ä", "--port", "1"],
        &["expose", "../x", "--port", "1"],
        &["expose", "a", "--port", "1", "--target", "h:1"],
        &["token", "create"],
        &["token", "create", "f", "--expires", "15"],
        &["token", "create", "f", "--expires", "90d"],
        &["trace", "a:0"],
        &["get", "pods"],
        &["status", "-n", "../x"],
        &["delete", "connector"],
    ];
    for args in cases {
        let error = fails(&fake.run(args), 2);
        assert!(error.starts_with("error: "), "{args:?}: {error}");
    }
}

#[test]
fn a_missing_controller_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| fake::skctl(dir.path(), args, b"");
    let error = fails(&run(&["status"]), 1);
    assert!(error.contains("there is no site") && error.contains("skctl init"), "{error}");
    for args in [&["start"][..], &["stop"], &["logs"], &["upgrade"], &["delete", "--yes"]] {
        assert!(fails(&run(args), 1).contains("skctl init"), "{args:?}");
    }
    fs::create_dir_all(dir.path().join("default")).unwrap();
    fs::write(dir.path().join("default/identity.key"), "").unwrap();
    let error = fails(&run(&["status"]), 1);
    assert!(error.contains("not running") && error.contains("skctl start"), "{error}");
    assert!(ok(&run(&["version"])).starts_with("skctl "));
    let output = run(&["doctor", "-o", "name"]);
    assert_eq!((fails(&output, 1).as_str(), text(&output.stdout).as_str()), ("", "controller\n"));
    let error = fails(&run(&["delete"]), 2);
    assert!(error.contains("--yes"), "{error}");
}

#[test]
fn completions_exist_for_every_shell() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(ok(&fake::skctl(dir.path(), &["completion", shell], b"")).contains("expose"));
    }
}

#[test]
fn a_dump_is_private_and_leaves_tokens_out() {
    let fake = Fake::start();
    let path = fake.dir().join("dump.json");
    ok(&fake.run(&["debug", "dump", path.to_str().unwrap(), "-q"]));
    let dump = fs::read_to_string(&path).unwrap();
    let value: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(value["status"]["name"], "here");
    assert_eq!(value["resources"].as_array().unwrap().len(), 3);
    assert!(value["resources"].as_array().unwrap().iter().all(|r| r["kind"] != "AccessToken"));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}
