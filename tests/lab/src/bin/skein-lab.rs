//! A network to play in: a hub on a public LAN and two hosts behind their own NATs, until stdin ends.
//!
//! `skein-lab sink ADDRESS` and `skein-lab say ADDRESS BYTES` are the smallest server and client the
//! lab's own test needs: the server counts what a connection brings and answers with the number. `echo` and `ping` do the same
//! with datagrams.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use skein_lab::Lab;

/// Shorter than a minute of TCP retries, longer than any rate limit of the test.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an answer to a datagram is waited for after the last has been sent.
const ECHO_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => play(),
        ["sink", address] => sink(address),
        ["say", address, bytes] => say(address.parse()?, bytes.parse()?),
        ["echo", address] => echo(address),
        ["ping", address, count, gap_us, bytes] => {
            ping(address.parse()?, count.parse()?, gap_us.parse()?, bytes.parse()?)
        }
        _ => bail!(
            "usage: skein-lab [sink ADDRESS | say ADDRESS BYTES | echo ADDRESS | ping ADDRESS COUNT GAP_US BYTES]"
        ),
    }
}

#[allow(clippy::print_stdout, reason = "this is a program for a terminal")]
fn play() -> Result<()> {
    let lab = Lab::new()?;
    let internet = lab.lan("internet", Ipv4Addr::new(203, 0, 113, 0))?;
    let hub = lab.host("hub")?;
    hub.join(&internet)?;
    let branch = lab.host_behind_nat("branch", &internet)?;
    let dc = lab.host_behind_nat("dc", &internet)?;
    for host in [&hub, &branch, &dc] {
        println!("{:8} {:15} {}", host.name(), host.address(), host.shell_line());
    }
    println!("ready in {}; ends with stdin", lab.dir().display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the test waits for this line")]
fn sink(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("listening");
    loop {
        let (mut stream, peer) = listener.accept()?;
        let mut count = 0;
        let mut buffer = vec![0; 64 << 10];
        // A connection that a cut ended is not the end of the server.
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            count += n;
        }
        println!("{count} from {}", peer.ip());
        let _ = stream.write_all(count.to_string().as_bytes());
    }
}

fn say(address: SocketAddr, bytes: usize) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.write_all(&vec![b'x'; bytes])?;
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.parse::<usize>().context("the answer")? == bytes, "{answer} of {bytes} arrived");
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the test waits for this line")]
fn echo(address: &str) -> Result<()> {
    let socket = UdpSocket::bind(address)?;
    println!("listening");
    let mut buffer = vec![0; 64 << 10];
    loop {
        // The error of an earlier answer is no reason to stop.
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        let _ = socket.send_to(&buffer[..len], from);
    }
}

/// Sends numbered datagrams at a steady rate and prints what came back: how many, copies, how many behind a later one, and the least,
/// mean and longest time, microseconds.
#[allow(clippy::print_stdout, reason = "the result")]
#[allow(clippy::disallowed_methods, reason = "a measuring program reads the clock")]
fn ping(address: SocketAddr, count: u32, gap_us: u64, bytes: usize) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(ECHO_TIMEOUT))?;
    let (gap, start) = (Duration::from_micros(gap_us), Instant::now());
    let sender = socket.try_clone()?;
    let sending = std::thread::spawn(move || {
        for n in 0..count {
            std::thread::sleep((start + gap * n).saturating_duration_since(Instant::now()));
            let mut datagram = vec![0; bytes.max(16)];
            let sent_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
            datagram[..4].copy_from_slice(&n.to_be_bytes());
            datagram[4..12].copy_from_slice(&sent_us.to_be_bytes());
            // Refused because it is too large: lost, like any other.
            let _ = sender.send(&datagram);
        }
    });
    let (mut seen, mut buffer) = (vec![false; count as usize], vec![0; 64 << 10]);
    let (mut copies, mut late, mut last, mut times) = (0, 0, 0, Vec::new());
    loop {
        let len = match socket.recv(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // That a datagram was too large, say.
            Err(_) => continue,
        };
        ensure!(len == bytes.max(16), "{len} bytes came back of {bytes}");
        let number = u32::from_be_bytes(*buffer.first_chunk().context("a number")?);
        let sent = u64::from_be_bytes(*buffer[4..].first_chunk().context("a time")?);
        let first = seen.get_mut(number as usize).context("a number we sent")?;
        if std::mem::replace(first, true) {
            copies += 1;
            continue;
        }
        late += u32::from(number < last);
        last = last.max(number);
        times.push(u64::try_from(start.elapsed().as_micros())?.saturating_sub(sent));
        if number + 1 == count && copies + late == 0 && times.len() == seen.len() {
            break;
        }
    }
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?;
    let mean = times.iter().sum::<u64>() / (times.len() as u64).max(1);
    let (least, most) = (times.iter().min().copied(), times.iter().max().copied());
    println!("{} {copies} {late} {} {mean} {}", times.len(), least.unwrap_or(0), most.unwrap_or(0));
    Ok(())
}
