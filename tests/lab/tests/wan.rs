//! A WAN box does what it was told, measured from outside of it.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::{
    Alone, Direction, Host, Lab, Loss, Mtu, Process, Profile, Rate, Wan, alone, eventually,
    require_root,
};

const BIN: &str = env!("CARGO_BIN_EXE_skein-lab");
const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 0);
const MS: Duration = Duration::from_millis(1);
/// What a busy machine may add to a round trip.
const BUSY: Duration = Duration::from_millis(40);
/// It may be too busy a few times.
const TRIES: usize = 5;

/// Two hosts, one of them behind a WAN box, the other with servers.
struct Net {
    _lab: Lab,
    near: Host,
    far: Host,
    wan: Wan,
    _servers: [Process; 2],
    /// Time is measured here, and threads are counted.
    _alone: Alone,
}

/// What came back of some datagrams.
#[derive(Debug)]
struct Pinged {
    answered: u32,
    copies: u32,
    late: u32,
    least: Duration,
    mean: Duration,
    most: Duration,
}

impl Net {
    fn new() -> Result<Self> {
        let alone = alone();
        let lab = Lab::new()?;
        let internet = lab.lan("internet", PUBLIC)?;
        let (near, far) = (lab.host("near")?, lab.host("far")?);
        far.join(&internet)?;
        let wan = near.join_through_wan(&internet, 4)?;
        let server = |kind: &str| {
            let server =
                far.command(BIN).args([kind, &format!("{}:7000", far.address())]).spawn()?;
            server.wait_for("listening", Duration::from_secs(5))?;
            Ok::<_, anyhow::Error>(server)
        };
        let servers = [server("sink")?, server("echo")?];
        Ok(Self { _lab: lab, near, far, wan, _servers: servers, _alone: alone })
    }

    fn ping(&self, count: u32, gap: Duration, bytes: usize) -> Result<Pinged> {
        let to = format!("{}:7000", self.far.address());
        let args = [&count.to_string(), &gap.as_micros().to_string(), &bytes.to_string()];
        let output = self.near.command(BIN).args(["ping", &to]).args(args).check()?.stdout;
        let numbers: Vec<u64> =
            output.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [answered, copies, late, least, mean, most] = numbers[..] else {
            anyhow::bail!("{output}")
        };
        let count = |n: u64| u32::try_from(n);
        let time = Duration::from_micros;
        Ok(Pinged {
            answered: count(answered)?,
            copies: count(copies)?,
            late: count(late)?,
            least: time(least),
            mean: time(mean),
            most: time(most),
        })
    }

    fn tcp(&self, bytes: usize) -> Result<bool> {
        let to = format!("{}:7000", self.far.address());
        let output = self.near.command(BIN).args(["say", &to, &bytes.to_string()]).run()?;
        Ok(output.code == Some(0))
    }
}

/// Measures until it took no longer than it should: a box that is too slow is so every time.
fn in_time<T: std::fmt::Debug>(
    mut measure: impl FnMut() -> Result<T>,
    is_in_time: impl Fn(&T) -> bool,
) -> Result<T> {
    let mut late = Vec::new();
    for _ in 0..TRIES {
        let measured = measure()?;
        if is_in_time(&measured) {
            return Ok(measured);
        }
        late.push(measured);
    }
    anyhow::bail!("too late each time: {late:?}")
}

#[test]
fn what_is_measured_is_what_was_set() -> Result<()> {
    if !require_root("a thread enters the network of the lab") {
        return Ok(());
    }
    let net = Net::new()?;
    let none = in_time(|| net.ping(1_000, MS, 100), |none| none.mean < BUSY)?;
    ensure!(none.answered == 1_000 && none.copies + none.late == 0, "{none:?}");

    net.wan.set(&Profile { delay: 100 * MS, ..Profile::default() });
    let delayed = in_time(|| net.ping(300, 2 * MS, 100), |delayed| delayed.mean < 200 * MS + BUSY)?;
    ensure!(delayed.answered == 300 && delayed.late == 0, "{delayed:?}");
    ensure!(delayed.least >= 200 * MS, "{delayed:?}");

    let jitter = Profile { delay: 100 * MS, jitter: 80 * MS, ..Profile::default() };
    net.wan.set_one_way(Direction::Up, jitter.clone());
    net.wan.set_one_way(Direction::Down, Profile::default());
    let orderly = net.ping(300, 5 * MS, 100)?;
    ensure!(orderly.answered == 300 && orderly.late == 0, "{orderly:?}");
    ensure!(orderly.least < 100 * MS && orderly.most > 160 * MS, "{orderly:?}");
    net.wan.set_one_way(Direction::Up, Profile { jitter_reorders: true, ..jitter });
    let wild = net.ping(300, 5 * MS, 100)?;
    ensure!(wild.answered == 300 && wild.late > 100, "{wild:?}");

    let share = Profile { loss: Loss::Random(0.07), ..Profile::default() };
    net.wan.set(&share);
    let lossy = net.ping(3_000, MS / 2, 100)?;
    // 0.93 squared is 0.865.
    ensure!((2_500..2_690).contains(&lossy.answered), "{lossy:?}");
    net.wan.set_one_way(Direction::Down, Profile::default());
    let one_way = net.ping(3_000, MS / 2, 100)?;
    ensure!((2_730..2_850).contains(&one_way.answered), "{one_way:?}");

    net.wan.set(&Profile::default());
    let twice =
        Profile { duplicate: 0.1, reorder: 0.05, reorder_by: 20 * MS, ..Profile::default() };
    net.wan.set_one_way(Direction::Up, twice);
    let twice = net.ping(2_000, MS, 100)?;
    ensure!(twice.answered == 2_000 && (150..250).contains(&twice.copies), "{twice:?}");
    ensure!((60..150).contains(&twice.late), "{twice:?}");
    Ok(())
}

#[test]
fn a_bottleneck_a_small_mtu_and_blocks() -> Result<()> {
    if !require_root("a thread enters the network of the lab") {
        return Ok(());
    }
    let net = Net::new()?;
    let rate = Rate { bits_per_second: 16_000_000, queue_bytes: 100_000 };
    net.wan.set(&Profile { rate: Some(rate), delay: 5 * MS, ..Profile::default() });
    let say = || {
        let mut said = Ok(false);
        let took = eventually("said", Duration::from_secs(30), || {
            said = net.tcp(4_000_000);
            Ok(true)
        })?;
        // 2.0 s of payload, 4 % of headers.
        ensure!(said? && took > Duration::from_millis(2_000), "{took:?}");
        Ok(took)
    };
    in_time(say, |took| *took < Duration::from_millis(3_500))
        .with_context(|| format!("{:?}", net.wan))?;
    // Twice what passes: the queue holds 50 ms of it.
    let overflow = || {
        let before = net.wan.counters(Direction::Up);
        let full = net.ping(2_000, MS / 4, 1_000)?;
        let overflowed = net.wan.counters(Direction::Up).overflowed - before.overflowed;
        ensure!(full.most > 40 * MS, "{full:?}");
        Ok((overflowed, full.most))
    };
    in_time(overflow, |(overflowed, most)| {
        (700..1_150).contains(overflowed) && *most < 60 * MS + 2 * BUSY
    })?;

    let mtu = Mtu { bytes: 1_280, is_told: false };
    net.wan.set(&Profile { mtu: Some(mtu), ..Profile::default() });
    ensure!(net.ping(5, MS, 1_280 - 28)?.answered == 5);
    ensure!(net.ping(5, MS, 1_281 - 28)?.answered == 0, "larger than the path");
    ensure!(net.wan.counters(Direction::Up).too_large == 5);
    net.wan.set(&Profile { mtu: Some(Mtu { is_told: true, ..mtu }), ..Profile::default() });
    // The kernel is told by the first, and splits the rest.
    let told = net.ping(10, 20 * MS, 1_400)?;
    ensure!((8..10).contains(&told.answered), "{told:?}");
    ensure!(net.tcp(1_000_000)?, "TCP adapts");

    net.wan.set(&Profile { block_udp: true, ..Profile::default() });
    ensure!(net.ping(5, MS, 100)?.answered == 0);
    ensure!(net.tcp(1_000)?);
    net.wan.set(&Profile { blackhole: true, ..Profile::default() });
    ensure!(!net.tcp(1_000)?);
    net.wan.set(&Profile::default());
    ensure!(net.tcp(1_000)? && net.ping(5, MS, 100)?.answered == 5, "all is well again");
    let held = [Direction::Up, Direction::Down].map(|way| net.wan.counters(way).unheld);
    ensure!(held == [0, 0], "{:?}", net.wan);
    Ok(())
}

#[test]
fn a_wan_box_ends_with_its_lab() -> Result<()> {
    if !require_root("a thread enters the network of the lab") {
        return Ok(());
    }
    let threads = || -> Result<usize> {
        let names = std::fs::read_dir("/proc/self/task")?.flatten();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
        Ok(names.filter_map(name).filter(|name| name.trim() == "wan").count())
    };
    let Net { _alone, _lab: lab, near, far, wan, .. } = Net::new()?;
    eventually("a thread", Duration::from_secs(5), || Ok(threads()? == 1))?;
    drop((lab, near, far, wan));
    eventually("none", Duration::from_secs(5), || Ok(threads()? == 0)).context("left behind")?;
    Ok(())
}
