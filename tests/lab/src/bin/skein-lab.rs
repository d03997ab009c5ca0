//! A network to play in: a hub on a public LAN and two hosts behind their own NATs, until stdin ends.
//!
//! `skein-lab sink ADDRESS` and `skein-lab say ADDRESS BYTES` are the smallest server and client the
//! lab's own test needs: the server counts what a connection brings and answers with the number.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use skein_lab::Lab;

/// Shorter than a minute of TCP retries, longer than any rate limit of the test.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => play(),
        ["sink", address] => sink(address),
        ["say", address, bytes] => say(address.parse()?, bytes.parse()?),
        _ => bail!("usage: skein-lab [sink ADDRESS | say ADDRESS BYTES]"),
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
