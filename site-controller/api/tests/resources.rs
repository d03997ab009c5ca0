//! Resources as users write them.

use skein_api::{
    DOCUMENT_LEN_MAX, Duration, Kind, ParseError, Resource, parse_documents, parse_json, to_yaml,
};

const EXAMPLE: &str = "\
apiVersion: skein.dev/v1alpha1
kind: Connector                     # a comment
metadata: {name: postgres}
spec: {address: postgres, host: 127.0.0.1, ports: [{port: 5432, targetPort: 5432, protocol: tcp}]}
---
apiVersion: skein.dev/v1alpha1
kind: Listener
metadata: {name: postgres}
spec: {address: postgres, host: 127.0.0.1, ports: [{port: 5432, localPort: 15432}]}
";

/// One of each kind with every field set.
const EVERYTHING: &str = "\
apiVersion: skein.dev/v1alpha1
kind: Site
metadata: {name: hub, labels: {team: a}, annotations: {note: \"no\"}}
spec:
  listen: ['[::]:7443', '0.0.0.0:7444']
  advertise: [hub.example, '203.0.113.7:7443']
  role: interior
  autoListen: payments.*
  platform: linux
  service: none
  manageHosts: true
  metricsListen: 127.0.0.1:9100
  limits: {memoryMib: 256, flows: 1000}
---
apiVersion: skein.dev/v1alpha1
kind: Link
metadata: {name: hub}
spec: {peer: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, endpoints: ['hub.example:7443'], cost: 3}
---
apiVersion: skein.dev/v1alpha1
kind: AccessGrant
metadata: {name: g}
spec: {uses: 3, expires: 1h30m, cost: 2, guest: true, scope: {consume: [db, pay.*], provide: ['x*'], transit: true}}
---
apiVersion: skein.dev/v1alpha1
kind: Connector
metadata: {name: web}
spec:
  address: web.prod
  hosts: [10.0.0.1, db.internal]
  ports: [{port: 80, targetPort: 8080}, {port: 443}]
  strategy: weighted
  priority: 1
  weight: 2
  cost: 3
  retry: at-least-once
  idleTimeout: 5m
  connectTimeout: 500ms
  source: site
  proxyProtocol: v2
";

#[test]
fn the_documented_example_parses() {
    let resources = parse_documents(EXAMPLE.as_bytes()).unwrap();
    let names: Vec<_> = resources.iter().map(|r| (r.kind(), r.name())).collect();
    assert_eq!(names, [(Kind::Connector, "postgres"), (Kind::Listener, "postgres")]);
    let Resource::Listener(listener) = &resources[1] else { panic!("not a listener") };
    assert_eq!(listener.spec.ports[0].local_port, Some(15432));
}

#[test]
fn yaml_and_json_round_trip() {
    for input in [EXAMPLE, EVERYTHING] {
        let resources = parse_documents(input.as_bytes()).unwrap();
        let yaml = to_yaml(&resources);
        assert_eq!(parse_documents(yaml.as_bytes()).unwrap(), resources, "{yaml}");
        assert_eq!(to_yaml(&parse_documents(yaml.as_bytes()).unwrap()), yaml);
        for resource in &resources {
            assert_eq!(&parse_json(&resource.to_json()).unwrap(), resource);
        }
    }
}

#[test]
fn defaults_are_those_of_the_command_line() {
    let input =
        "apiVersion: skein.dev/v1alpha1\nkind: AccessGrant\nmetadata: {name: g}\nspec: {}\n";
    let resources = parse_documents(input.as_bytes()).unwrap();
    let Resource::AccessGrant(grant) = &resources[0] else { panic!("not a grant") };
    assert_eq!((grant.spec.uses, grant.spec.expires), (1, Duration::from_secs(900)));
    let input =
        "apiVersion: skein.dev/v1alpha1\nkind: Site\nmetadata: {name: s}\nspec: {listen: []}\n";
    let resources = parse_documents(input.as_bytes()).unwrap();
    let Resource::Site(site) = &resources[0] else { panic!("not a site") };
    assert!(site.spec.listen.is_empty());
}

fn connector(spec: &str) -> String {
    format!(
        "apiVersion: skein.dev/v1alpha1\nkind: Connector\nmetadata: {{name: c}}\nspec: {spec}\n"
    )
}

#[test]
fn errors_name_the_place_and_the_rule() {
    let header = "# one\n\n---\napiVersion: skein.dev/v1alpha1\n";
    let cases = [
        (
            format!(
                "{header}kind: Connector\nmetadata: {{name: c}}\nspec:\n  address: a\n  prots: []\n"
            ),
            "line 9",
            "prots",
        ),
        (
            connector("{address: a, ports: [{port: many}]}"),
            "line 4",
            "spec.ports[0].port: must be a whole number",
        ),
        (connector("{address: a}"), "line", "ports"),
        (connector("{address: a, address: b, ports: []}"), "line 4", "duplicate"),
        (connector("{address: a, ports: [{port: 0}]}"), "spec.ports[0].port", "1 to 65535"),
        (connector("{address: a, ports: [{port: 70000}]}"), "spec.ports[0].port", "1 to 65535"),
        (connector("{address: A, ports: [{port: 1}]}"), "spec.address", "a-z"),
        (connector("{address: ../x, ports: [{port: 1}]}"), "spec.address", "not an address"),
        (connector("{address: 😀, ports: [{port: 1}]}"), "spec.address", "not an address"),
        (connector("{address: a, host: 'a:5', ports: [{port: 1}]}"), "spec.host", "without a port"),
        (connector("{address: a, idleTimeout: 5, ports: [{port: 1}]}"), "line 4", "units"),
        (connector("{address: a, ports: [{port: 1}, {port: 1}]}"), "spec.ports[1]", "twice"),
        (
            connector("{address: a, proxyProtocol: v2, ports: [{port: 1, protocol: udp}]}"),
            "spec.proxyProtocol",
            "udp",
        ),
        (connector("{address: a, ports: [{port: 1, protocol: sctp}]}"), "line 4", "sctp"),
        (connector("{address: ["), "line", ""),
        ("kind: Connector\n".to_string(), "line 1", "apiVersion is missing"),
        ("apiVersion: v1\nkind: Secret\n".to_string(), "apiVersion \"v1\"", "skein.dev/v1alpha1"),
        (
            "apiVersion: skein.dev/v1alpha1\nkind: Pod\n".to_string(),
            "unknown kind \"Pod\"",
            "Connector",
        ),
        (EXAMPLE.replace("name: postgres", "name: ../x"), "metadata.name", "a-z"),
        (
            EXAMPLE.replace("name: postgres", &format!("name: {}", "a".repeat(64))),
            "metadata.name",
            "63",
        ),
        (format!("{EXAMPLE}---\n{EXAMPLE}"), "line 10", "second time"),
    ];
    for (input, place, rule) in cases {
        let error = parse_documents(input.as_bytes()).unwrap_err().to_string();
        println!("{error}");
        assert!(error.contains(place), "{place:?} not in {error:?}");
        assert!(error.contains(rule), "{rule:?} not in {error:?}");
        assert!(!error.contains('\n') && error.len() < 400, "{error:?}");
    }
}

#[test]
fn hostile_input_is_refused_quickly() {
    let huge = vec![b'a'; 10 * 1024 * 1024];
    assert!(matches!(parse_documents(&huge), Err(ParseError::InputTooLong { .. })));
    let long = connector(&format!("{{address: {}}}", "a".repeat(DOCUMENT_LEN_MAX)));
    assert!(matches!(parse_documents(long.as_bytes()), Err(ParseError::DocumentTooLong { .. })));
    let many = "a: 1\n---\n".repeat(20_000);
    assert!(parse_documents(many.as_bytes()).is_err());
    assert!(parse_documents(&[0xff, 0xfe, 0x00]).is_err());
    let deep = connector(&"[".repeat(10_000));
    assert!(parse_documents(deep.as_bytes()).is_err());
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
    assert!(parse_documents(bomb.as_bytes()).is_err());
}

#[test]
fn empty_documents_are_skipped() {
    for input in ["", "---\n", "# nothing\n---\n...\n", "\u{feff}"] {
        assert_eq!(parse_documents(input.as_bytes()), Ok(Vec::new()), "{input:?}");
    }
    let padded = format!("---\n# c\n---\n{EXAMPLE}\n---\n");
    assert_eq!(parse_documents(padded.as_bytes()).unwrap().len(), 2);
}

#[test]
fn a_secret_is_not_debug_printed() {
    let spec = skein_api::AccessTokenSpec {
        token: "hunter2".into(),
        link_name: None,
        cost: None,
        merge: false,
        consume: Vec::new(),
        provide: Vec::new(),
    };
    assert!(!format!("{spec:?}").contains("hunter2"));
}
