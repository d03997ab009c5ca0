//! Writes one well-formed input of each kind into the corpora, for fuzzing to start from.

use aws_lc_rs::rand::SystemRandom;
use bytes::BytesMut;
use prost::Message;
use skein_api::{Code, Token};
use skein_core::{
    Address, AddressEntry, AddressPage, Handle, Label, LinkAdvert, LinkId, Payload, Pin, Port,
    Protocol, RecordDraft, RecordKey, Role, RouterLsa, Strategy,
};
use skein_trust::{
    ClaimDraft, EndorsementDraft, KeyRequest, SiteCa, SiteIdentity, StatementDraft, claim_request,
    router_id,
};
use skein_wire::{
    convert::encode_body,
    frame::{Control, HEADER_LEN, Key, Template, seal},
    framing::encode,
    proto::{claim, control, routing, session, trust::Membership},
};
use std::{collections::HashMap, error::Error, fs, path::Path, sync::Arc};

const NOW: i64 = 1_800_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let random = SystemRandom::new();
    let (mut site, other) = (SiteIdentity::generate(&random)?, SiteIdentity::generate(&random)?);
    let ca = SiteCa::generate(site.site_id(), &random, NOW)?;
    let request = KeyRequest::generate()?;
    let issued = ca.issue_router(request.csr(), "r1", &random, NOW)?;
    let statement = site.statement(&statement_draft(&ca));
    let endorsement = site.endorsement(&endorsement_draft(&other));
    let revocation = site.revocation(other.site_id(), 1, NOW, "laptop stolen");
    site.rotate(&random)?;
    let rotated = site.statement(&statement_draft(&ca));

    for (name, record) in [
        ("statement", &statement),
        ("endorsement", &endorsement),
        ("revocation", &revocation),
        ("rotated", &rotated),
    ] {
        write("record", name, &framed_record(&record.body, &record.signature))?;
    }
    let drafts = router_drafts(&site, &issued.chain[0]);
    for (name, draft) in ["lsa", "page", "purge"].iter().zip(drafts) {
        write("record", name, &framed_record(&encode_body(&draft)?, &[7; 64]))?;
    }
    link_messages(&statement)?;
    sessions()?;

    let draft = ClaimDraft {
        code: &skein_trust::Code::from_bytes(&[9; 16]).ok_or("code")?,
        issuer: other.site_id(),
        statement: rotated.clone(),
        endorsement: endorsement.clone(),
        merge: true,
        unix_s: NOW,
    };
    write("claim", "request", &claim_request(&site, draft, &[3; 32]).encode_to_vec())?;
    let accepted = claim::ClaimAccepted {
        statement: Some(rotated),
        endorsement: Some(endorsement),
        records: vec![statement],
        endpoints: vec!["hub.example:7443".into()],
        network_id: vec![1; 32],
        ..claim::ClaimAccepted::default()
    };
    let outcome = Some(claim::claim_response::Outcome::Accepted(accepted));
    write("claim", "answer", &claim::ClaimResponse { outcome }.encode_to_vec())?;
    write("claim", "token", token(&site)?.encode().as_bytes())?;

    write("certificate", "leaf", &issued.chain[0])?;
    write("certificate", "ca", &issued.chain[1])?;
    write("certificate", "csr", request.csr())?;
    let id = format!("spiffe://{}/router/r1", site.site_id());
    write("certificate", "id", id.as_bytes())?;
    frames()?;
    write("config", "small", &router_config().encode_to_vec())?;
    write("resources", "all", include_bytes!("resources.yaml"))?;
    Ok(())
}

fn statement_draft(ca: &SiteCa) -> StatementDraft {
    StatementDraft {
        epoch: 1,
        name: "amsterdam".into(),
        ca_certificates: vec![ca.certificate().to_vec()],
        endpoints: vec!["amsterdam.example:7443".into()],
        network_id: None,
        expires_unix_s: NOW + 86_400,
    }
}

fn endorsement_draft(subject: &SiteIdentity) -> EndorsementDraft {
    EndorsementDraft {
        subject: subject.site_id(),
        membership: Membership::Guest,
        scope: Some(skein_wire::proto::trust::Scope {
            consume: vec!["backend".into(), "payments.*".into()],
            provide: Vec::new(),
            transit: true,
        }),
        may_endorse: false,
        sequence: 1,
        valid_until_unix_s: NOW + 86_400,
    }
}

fn router_drafts(site: &SiteIdentity, leaf: &[u8]) -> [RecordDraft; 3] {
    let router = router_id(site.site_id(), "r1");
    let link = LinkAdvert {
        neighbor: router,
        link: LinkId(77),
        label: Label(3),
        cost: 1,
        rtt_us: 12_000,
        mtu: 1_400,
    };
    let lsa = RouterLsa {
        router,
        site: site.site_id(),
        name: "r1".into(),
        site_name: "amsterdam".into(),
        role: Role::Interior,
        handle: Handle(42),
        boot_epoch: 1,
        pages_since: 0,
        certificate: leaf.into(),
        links: vec![link],
        protocol_min: 1,
        protocol_max: 1,
        endpoints: vec!["192.0.2.1:7443".into()],
        version: "0.1.0".into(),
        leaving: false,
    };
    let entry = AddressEntry {
        address: "backend".parse::<Address>().expect("an address"),
        ports: vec![Port { port: 5432, protocol: Protocol::Tcp }],
        strategy: Strategy::Closest,
        cost: 1,
        priority: 0,
        weight: 1,
        at_least_once: false,
    };
    let page = Payload::AddressPage(AddressPage { entries: vec![Arc::new(entry)] });
    let draft =
        |key, lifetime_s, payload| RecordDraft { key, sequence: 1 << 32, lifetime_s, payload };
    let empty = Payload::AddressPage(AddressPage::default());
    [
        draft(RecordKey::lsa(router), 3600, Payload::RouterLsa(Arc::new(lsa))),
        draft(RecordKey::page(router, 5), 3600, page),
        draft(RecordKey::page(router, 5), 0, empty),
    ]
}

fn link_messages(record: &routing::Record) -> Result<(), Box<dyn Error>> {
    use routing::link_message::Message;
    let header = routing::RecordHeader {
        kind: 1,
        origin: vec![1; 32],
        subkey: vec![],
        sequence: 9,
        digest: vec![2; 16],
    };
    let aged = routing::AgedRecord { record: Some(record.clone()), remaining_s: 600 };
    let headers = vec![header];
    let messages = [
        (
            "summary",
            Message::Summary(routing::DatabaseSummary { headers: headers.clone(), last: true }),
        ),
        ("request", Message::Request(routing::DatabaseRequest { headers })),
        ("records", Message::Records(routing::Records { records: vec![aged] })),
        (
            "parameters",
            Message::Parameters(routing::LinkParameters { cost: 2, rtt_us: 900, mtu: 1_400 }),
        ),
    ];
    let mut stream = BytesMut::new();
    for (name, message) in messages {
        let message = routing::LinkMessage { message: Some(message) };
        write("link_message", name, &message.encode_to_vec())?;
        encode(&message, &mut stream);
    }
    write("framing", "stream", &[&[7], &stream[..]].concat())
}

fn sessions() -> Result<(), Box<dyn Error>> {
    let hello = session::SessionHello {
        protocol_max: 1,
        initial_credit_bytes: 262_144,
        ..session::SessionHello::default()
    };
    write("session", "hello", &hello.encode_to_vec())?;
    let credit = session::Credit { flow: 4, add_bytes: 65_536, return_bytes: 0 };
    let message = session::SessionMessage {
        credits: vec![credit],
        draining: true,
        ..session::SessionMessage::default()
    };
    write("session", "message", &message.encode_to_vec())?;
    let open = session::FlowOpen {
        address: "backend".into(),
        port: 5432,
        protocol: 1,
        flow_id: vec![1; 16],
        trace_context: vec![2; 25],
        attributes: HashMap::from([("k".into(), b"v".to_vec())]),
        client: "192.0.2.9:40000".into(),
    };
    write("session", "open", &open.encode_to_vec())?;
    let refused = session::Refused { reason: 3, detail: "connection refused".into() };
    let outcome = Some(session::flow_reply::Outcome::Refused(refused));
    write("session", "reply", &session::FlowReply { outcome }.encode_to_vec())
}

fn token(site: &SiteIdentity) -> Result<Token, Box<dyn Error>> {
    Ok(Token {
        endpoints: vec!["hub.example:7443".into()],
        issuer: site.site_id(),
        issuer_name: "hub".into(),
        ca_sha256: [5; 32],
        code: Code::new(vec![9; 16]).ok_or("code")?,
        network: site.site_id(),
        expires_unix_s: NOW,
        uses: 1,
        cost: 1,
        guest: false,
    })
}

fn frames() -> Result<(), Box<dyn Error>> {
    let labels: Vec<Label> = (1..=20).map(Label).collect();
    for (name, count) in [("short", 3), ("full", 7), ("long", 20)] {
        let mut frame = Template::data(Handle(42), Pin(1), &labels[..count])?.bytes().to_vec();
        frame.extend_from_slice(&[0x40; 64]);
        seal(&mut frame, &Key::new([7; 16]), 1, 99);
        write("frame", name, &frame)?;
    }
    let mut probe = Vec::new();
    Control::Probe { token: 5 }.encode(Handle(42), HEADER_LEN + 32, &mut probe);
    write("frame", "probe", &probe)
}

fn router_config() -> control::RouterConfig {
    control::RouterConfig {
        settings: Some(control::RouterSettings {
            role: 1,
            listen: vec!["[::]:7443".into()],
            site_name: "hub".into(),
            ..control::RouterSettings::default()
        }),
        links: vec![control::LinkConfig {
            name: "hub".into(),
            peer_site_id: vec![1; 32],
            endpoints: vec!["hub.example:7443".into()],
            cost: 1,
        }],
        listeners: vec![control::ListenerConfig {
            name: "backend".into(),
            address: "backend".into(),
            host: "127.0.0.1".into(),
            ports: vec![control::ListenerPort {
                port: 80,
                local_port: 8080,
                ..control::ListenerPort::default()
            }],
            automatic: true,
        }],
        connectors: vec![control::ConnectorConfig {
            name: "db".into(),
            targets: vec!["localhost".into()],
            ..control::ConnectorConfig::default()
        }],
        records: Vec::new(),
    }
}

fn framed_record(body: &[u8], signature: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a small body").to_be_bytes();
    [&length, body, signature].concat()
}

fn write(target: &str, name: &str, data: &[u8]) -> Result<(), Box<dyn Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), data)?;
    Ok(())
}
