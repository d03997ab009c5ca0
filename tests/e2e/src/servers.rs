//! Real servers from Debian packages, on the loopback of a host.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use skein_lab::{Host, Process, eventually};

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether a TCP port of the host's loopback is listened on.
fn listening(host: &Host, port: u16) -> Result<bool> {
    let filter = format!("sport = :{port}");
    let output = host.command("ss").args(["-Hltn", &filter]).check()?;
    Ok(!output.stdout.trim().is_empty())
}

fn wait_listening(host: &Host, port: u16, process: Process) -> Result<Process> {
    eventually(&format!("port {port} at {}", host.name()), START_TIMEOUT, || listening(host, port))
        .with_context(|| process.stderr())?;
    Ok(process)
}

/// PostgreSQL, run by its own user as it insists; the superuser `postgres` needs no password.
///
/// # Errors
/// When it does not start.
pub fn postgres(host: &Host, port: u16) -> Result<Process> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("package postgresql")?;
    let newest =
        versions.flatten().map(|entry| entry.path()).max().context("package postgresql")?;
    let bin = newest.join("bin");
    let data = host.dir().join("postgres");
    host.command("install").args(["-d", "-m", "700", "-o", "postgres"]).arg(&data).check()?;
    let initdb = host.command(bin.join("initdb")).user("postgres");
    initdb.args(["--auth=trust", "--no-sync", "-U", "postgres", "-D"]).arg(&data).check()?;
    let server = host
        .command(bin.join("postgres"))
        .user("postgres")
        .arg("-D")
        .arg(&data)
        .args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k", "", "-F"])
        .spawn()?;
    wait_listening(host, port, server)
}

/// nginx on loopback over the files of the returned directory.
///
/// # Errors
/// When it does not start.
pub fn nginx(host: &Host, port: u16) -> Result<(Process, PathBuf)> {
    nginx_on(host, "127.0.0.1", port)
}

/// nginx on one address of the host.
///
/// # Errors
/// When it does not start.
pub fn nginx_on(host: &Host, address: &str, port: u16) -> Result<(Process, PathBuf)> {
    let dir = host.dir().join("www");
    std::fs::create_dir_all(&dir)?;
    let tmp = host.dir().join("tmp");
    let config = host.dir().join(format!("nginx-{address}.conf"));
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", tmp.display()))
        .concat();
    let user = if skein_lab::Lab::rootless() { "" } else { "user root;" };
    std::fs::write(
        &config,
        format!(
            "{user} daemon off; pid {0}/nginx-{address}.pid; error_log stderr; worker_processes 1;
             events {{}}
             http {{ access_log off; sendfile on; {paths}
               server {{ listen {address}:{port}; root {1}; }} }}",
            tmp.display(),
            dir.display(),
        ),
    )?;
    let server = host.command("nginx").arg("-c").arg(&config).args(["-e", "stderr"]).spawn()?;
    Ok((wait_listening(host, port, server)?, dir))
}

/// Redis without persistence.
///
/// # Errors
/// When it does not start.
pub fn redis(host: &Host, port: u16) -> Result<Process> {
    let port_arg = port.to_string();
    let args = ["--port", &port_arg, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
    let server = host.command("redis-server").args(args).spawn()?;
    wait_listening(host, port, server)
}

/// OpenSSH with one key, whose private half is in the returned file.
///
/// # Errors
/// When it does not start.
pub fn sshd(host: &Host, port: u16) -> Result<(Process, PathBuf)> {
    let dir = host.dir().join("ssh");
    std::fs::create_dir_all(&dir)?;
    let key = |name: &str| -> Result<PathBuf> {
        let path = dir.join(name);
        let keygen = host.command("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        keygen.arg(&path).check()?;
        Ok(path)
    };
    let (host_key, user_key) = (key("host")?, key("user")?);
    host.command("mkdir").args(["-p", "/run/sshd"]).check()?;
    let config = dir.join("sshd_config");
    let text = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}.pub\n\
         PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n\
         Subsystem sftp internal-sftp\n",
        host_key.display(),
        user_key.display(),
    );
    std::fs::write(&config, text)?;
    let server = host.command("/usr/sbin/sshd").args(["-D", "-e", "-f"]).arg(&config).spawn()?;
    Ok((wait_listening(host, port, server)?, user_key))
}

/// tinyproxy for whoever knows `user` and `password`, towards ports of sites alone.
///
/// # Errors
/// When it does not start.
pub fn tinyproxy(host: &Host, port: u16, (user, password): (&str, &str)) -> Result<Process> {
    let config = host.dir().join("tinyproxy.conf");
    let text = format!(
        "Port {port}\nTimeout 600\nMaxClients 100\nLogLevel Info\nBasicAuth {user} {password}\nConnectPort 7443\n"
    );
    std::fs::write(&config, text)?;
    let server = host.command("tinyproxy").args(["-d", "-c"]).arg(&config).spawn()?;
    wait_listening(host, port, server)
}

/// haproxy that passes TLS connections for `name` on to `target` as they are, and refuses others.
///
/// # Errors
/// When it does not start.
pub fn sni_balancer(host: &Host, port: u16, name: &str, target: &str) -> Result<Process> {
    let config = host.dir().join("haproxy.cfg");
    let text = format!(
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n\
         frontend tls\n  bind :{port}\n  tcp-request inspect-delay 5s\n\
           \x20 tcp-request content accept if {{ req.ssl_hello_type 1 }}\n\
           \x20 use_backend site if {{ req.ssl_sni -i {name} }}\n\
         backend site\n  server site {target}\n"
    );
    std::fs::write(&config, text)?;
    let server = host.command("haproxy").args(["-db", "-f"]).arg(&config).spawn()?;
    wait_listening(host, port, server)
}

/// haproxy that passes TCP connections on to one target, as they are.
///
/// # Errors
/// When it does not start.
pub fn tcp_proxy(host: &Host, port: u16, target: SocketAddr) -> Result<Process> {
    let config = host.dir().join("haproxy-tcp.cfg");
    let text = format!(
        "defaults\n mode tcp\n timeout connect 30s\n timeout client 1h\n timeout server 1h\n\
         listen l\n bind 127.0.0.1:{port}\n server s {target}\n"
    );
    std::fs::write(&config, text)?;
    let server = host.command("haproxy").args(["-db", "-f"]).arg(&config).spawn()?;
    wait_listening(host, port, server)
}

/// iperf3's server.
///
/// # Errors
/// When it does not start.
pub fn iperf3(host: &Host, port: u16) -> Result<Process> {
    let args = ["-s", "-B", "127.0.0.1", "-p", &port.to_string()].map(str::to_owned);
    let server = host.command("iperf3").args(args).spawn()?;
    wait_listening(host, port, server)
}

/// dnsmasq that answers for `example` alone: a host, and a text record of `big_len` bytes.
///
/// # Errors
/// When it does not start.
pub fn dnsmasq(host: &Host, port: u16, big_len: usize) -> Result<Process> {
    let text = vec!["x".repeat(200); big_len / 200].join(",");
    let server = host
        .command("dnsmasq")
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
        .args(["--user=root", "--bind-interfaces", "--listen-address=127.0.0.1", "--pid-file="])
        .args(["--log-facility=-", "--edns-packet-max=4096", "--local=/example/"])
        .args([format!("--port={port}"), "--address=/host.example/192.0.2.7".to_owned()])
        .arg(format!("--txt-record=big.example,{text}"))
        .spawn()?;
    wait_listening(host, port, server)
}

/// ngtcp2's HTTP/3 server over the files of the returned directory.
///
/// # Errors
/// When it does not start.
pub fn gtlsserver(host: &Host, port: u16) -> Result<(Process, PathBuf)> {
    let (root, tls) = (host.dir().join("htdocs"), host.dir().join("tls"));
    for dir in [&root, &tls] {
        std::fs::create_dir_all(dir)?;
    }
    let (key, certificate) = (tls.join("key.pem"), tls.join("cert.pem"));
    host.command("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=h3.example", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .check()?;
    let server = host
        .command("gtlsserver")
        .arg("-q")
        .arg(format!("--htdocs={}", root.display()))
        .args(["127.0.0.1".to_owned(), port.to_string()])
        .arg(&key)
        .arg(&certificate)
        .spawn()?;
    let what = format!("port {port} at {}", host.name());
    eventually(&what, START_TIMEOUT, || {
        let filter = format!("sport = :{port}");
        Ok(!host.command("ss").args(["-Hlun", &filter]).check()?.stdout.trim().is_empty())
    })
    .with_context(|| server.stderr())?;
    Ok((server, root))
}
