use super::{fake_controller::FakeController, *};
use skein_core::SiteId;
use skein_wire::proto::{
    control::{ListenerConfig, TraceReply},
    routing::Record,
};
use std::path::Path;
use tempfile::TempDir;
use tokio::task::JoinSet;

struct Bench {
    controller: Controller,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
    dir: TempDir,
}

impl Bench {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("c.sock");
        let (controller, task) = attachment(ControllerAddress::Unix(socket), "r1".into());
        let (mut tasks, cancel) = (JoinSet::new(), CancellationToken::new());
        tasks.spawn(task.run(cancel.clone()));
        Self { controller, tasks, cancel, dir }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("c.sock")
    }

    async fn stop(mut self) {
        self.cancel.cancel();
        self.tasks.join_next().await.unwrap().unwrap();
    }
}

fn listen(path: &Path) -> FakeController {
    FakeController::listen(path)
}

fn some_config(names: &[&str]) -> RouterConfig {
    let listeners = names
        .iter()
        .map(|name| ListenerConfig {
            name: (*name).into(),
            address: "backend.of.some.length".into(),
            ..ListenerConfig::default()
        })
        .collect();
    let mut config = RouterConfig { listeners, ..RouterConfig::default() };
    config::canonicalise(&mut config);
    config
}

async fn configured(controller: &mut Controller) -> (u64, Arc<RouterConfig>) {
    loop {
        match controller.orders.recv().await.unwrap() {
            Order::Configure { version, config } => return (version, config),
            Order::Attached(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test]
async fn configuration_arrives_whole_and_then_as_deltas() {
    let mut bench = Bench::start();
    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    assert_eq!((attached.attach.router_name.as_str(), attached.attach.boot_epoch), ("r1", 0));

    attached
        .send(to_router::Message::Welcome(Welcome { boot_epoch: 7, ..Welcome::default() }))
        .await;
    let first = some_config(&["a", "b", "c", "d"]);
    for chunk in config::snapshot(1, &first) {
        attached.send(to_router::Message::Snapshot(chunk)).await;
    }
    let welcome = bench.controller.orders.recv().await.unwrap();
    assert!(matches!(welcome, Order::Attached(w) if w.boot_epoch == 7));
    assert_eq!(configured(&mut bench.controller).await, (1, Arc::new(first.clone())));

    let second = some_config(&["a", "b", "c", "e"]);
    let delta = config::diff(1, &first, 2, &second).unwrap();
    attached.send(to_router::Message::Delta(delta.clone())).await;
    assert_eq!(configured(&mut bench.controller).await, (2, Arc::new(second)));

    // The same delta again starts from a version that is no longer in force.
    attached.send(to_router::Message::Delta(delta)).await;
    let Some(from_router::Message::Applied(applied)) = attached.next().await else {
        panic!("an answer to the wrong delta")
    };
    assert!(applied.need_full && applied.version == 2, "{applied:?}");
    bench.stop().await;
}

#[tokio::test]
async fn what_is_no_configuration_is_not_asked_for_again() {
    let bench = Bench::start();
    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    let mut chunk = config::snapshot(1, &some_config(&["a"])).remove(0);
    chunk.chunk = b"\xff".to_vec();
    chunk.sha256 =
        aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &chunk.chunk).as_ref().into();
    attached.send(to_router::Message::Snapshot(chunk)).await;
    let Some(from_router::Message::Applied(applied)) = attached.next().await else {
        panic!("no answer")
    };
    assert!(applied.refused && !applied.need_full, "{applied:?}");
    bench.stop().await;
}

#[tokio::test]
async fn a_controller_that_comes_back_is_told_everything_again() {
    let bench = Bench::start();
    let key = |n: u8| RecordKey::statement(SiteId([n; 32]));
    let record = |n: u8| Record { body: vec![n].into(), signature: vec![n].into() };
    let mut learned = LearnedRecords::from([(key(1), record(1))]);
    bench.controller.facts.learned.send_replace(Arc::new(learned.clone()));
    bench.controller.facts.csr.send_replace(Some(vec![9]));

    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    assert!(
        matches!(attached.next().await, Some(from_router::Message::CertificateRequest(r)) if r.csr == [9])
    );
    assert!(
        matches!(attached.next().await, Some(from_router::Message::Learned(l)) if l.records == [record(1)])
    );

    // Only what is new is sent while the attachment lasts.
    learned.insert(key(2), record(2));
    bench.controller.facts.learned.send_replace(Arc::new(learned));
    assert!(
        matches!(attached.next().await, Some(from_router::Message::Learned(l)) if l.records == [record(2)])
    );

    bench.controller.facts.boot_epoch.send_replace(7);
    drop((attached, fake));
    let mut controller_gone = bench.controller.attached.clone();
    controller_gone.wait_for(|attached| !attached).await.unwrap();

    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    assert_eq!(attached.attach.boot_epoch, 7);
    assert!(matches!(attached.next().await, Some(from_router::Message::CertificateRequest(_))));
    assert!(
        matches!(attached.next().await, Some(from_router::Message::Learned(l)) if l.records == [record(1), record(2)])
    );
    bench.stop().await;
}

#[tokio::test]
async fn the_last_status_of_a_burst_arrives() {
    let bench = Bench::start();
    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    for flows_total in 1..=100 {
        let status = RouterStatus { flows_total, ..RouterStatus::default() };
        bench.controller.facts.status.send_replace(Some(Arc::new(status)));
    }
    let mut messages = 0;
    loop {
        let Some(from_router::Message::Status(status)) = attached.next().await else {
            panic!("a status")
        };
        messages += 1;
        if status.flows_total == 100 {
            break;
        }
    }
    assert!(messages <= 2, "{messages} messages for one burst");
    bench.stop().await;
}

#[tokio::test]
async fn answers_to_an_attachment_that_is_gone_are_dropped() {
    let bench = Bench::start();
    let reply = |id| from_router::Message::Trace(TraceReply { id, ..TraceReply::default() });
    bench.controller.reply(reply(1));
    // Nobody serves the socket yet; the first failed dial drops what was queued before it.
    let mut drained = bench.controller.replier();
    while drained.capacity() < REPLIES_QUEUE {
        tokio::task::yield_now().await;
    }
    let mut fake = listen(&bench.socket());
    let mut attached = fake.attached().await;
    drained = bench.controller.replier();
    drained.send(reply(2)).await.unwrap();
    assert!(matches!(attached.next().await, Some(from_router::Message::Trace(t)) if t.id == 2));
    bench.stop().await;
}

#[tokio::test]
async fn a_router_reads_while_its_controller_does_not() {
    let mut bench = Bench::start();
    let mut server = listen(&bench.socket());
    let attachment = server.attached().await;
    // Far more than fits between the two.
    for id in 0..u64::try_from(REPLIES_QUEUE).unwrap() {
        let reply = TraceReply { id, error: "x".repeat(256 << 10), ..TraceReply::default() };
        bench.controller.reply(from_router::Message::Trace(reply));
    }
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    assert!(bench.controller.replies.capacity() < REPLIES_QUEUE, "it is stuck");
    let config = some_config(&["a"]);
    for chunk in config::snapshot(1, &config) {
        attachment.send(to_router::Message::Snapshot(chunk)).await;
    }
    let taken = time::timeout(Duration::from_secs(10), configured(&mut bench.controller)).await;
    assert_eq!(taken.expect("it reads").0, 1);
    bench.stop().await;
}
