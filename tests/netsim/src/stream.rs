//! Simulated TCP and Unix sockets, with the methods of tokio's that Skein uses.

use crate::{
    conn::{Conn, End, ListenerState, Phase},
    net::{Host, register},
    udp::{any_is_v4, is_taken},
};
use bytes::{BufMut, Bytes};
use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Where both ends of a Unix socket seem to be.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// One end of a connection.
#[derive(Debug)]
struct Socket {
    host: Host,
    conn: u64,
    side: usize,
    local: SocketAddr,
    remote: SocketAddr,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.host.net.with(|world| world.conn_close(self.conn, self.side));
    }
}

impl Socket {
    async fn connect(
        host: &Host,
        remote: SocketAddr,
        source: Option<IpAddr>,
        path: Option<&Path>,
    ) -> io::Result<Self> {
        let path = path.map(Path::to_owned);
        let socket = host.net.with(|world| {
            let conn = world.connect((host.id, host.owner), remote, source, path)?;
            let local = world.conns[&conn].ends[0].local;
            Ok::<_, io::Error>(Self { host: host.clone(), conn, side: 0, local, remote })
        })?;
        poll_fn(|cx| {
            socket.host.net.with(|world| match world.conns.get_mut(&socket.conn) {
                None => Poll::Ready(Err(io::Error::from(io::ErrorKind::ConnectionAborted))),
                Some(Conn { phase: Phase::Failed(kind), .. }) => Poll::Ready(Err((*kind).into())),
                Some(Conn { phase: Phase::Open, .. }) => Poll::Ready(Ok(())),
                Some(conn) => {
                    register(&mut conn.connecting, cx);
                    Poll::Pending
                }
            })
        })
        .await?;
        Ok(socket)
    }

    fn read(&self, len_max: usize) -> io::Result<Bytes> {
        self.host.net.with(|world| world.conn_read(self.conn, self.side, len_max))
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.host.net.with(|world| world.conn_write(self.conn, self.side, bytes))
    }

    fn change(&self, change: impl FnOnce(&mut End)) {
        self.host.net.with(|world| {
            if let Some(conn) = world.conns.get_mut(&self.conn) {
                change(&mut conn.ends[self.side]);
            }
        });
    }

    /// Ready once `is` holds of this end, or it is gone.
    fn poll_until(
        &self,
        cx: &Context<'_>,
        is: impl Fn(&End) -> bool,
        wakers: impl Fn(&mut End) -> &mut Vec<Waker>,
    ) -> Poll<()> {
        self.host.net.with(|world| match world.conns.get_mut(&self.conn) {
            Some(conn) if !is(&conn.ends[self.side]) => {
                register(wakers(&mut conn.ends[self.side]), cx);
                Poll::Pending
            }
            _ => Poll::Ready(()),
        })
    }

    fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll_until(cx, End::is_readable, |end| &mut end.readers)
    }

    fn poll_writable(&self, cx: &Context<'_>) -> Poll<()> {
        self.poll_until(cx, End::is_writable, |end| &mut end.writers)
    }

    fn poll_read(&self, cx: &Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.read(buf.remaining()) {
                Ok(bytes) => {
                    buf.put_slice(&bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.poll_readable(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_write(&self, cx: &Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.poll_writable(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn finish(&self) -> io::Result<()> {
        self.host.net.with(|world| world.conn_finish(self.conn, self.side))
    }
}

/// The read half of a stream.
#[derive(Debug)]
pub struct OwnedReadHalf(Arc<Socket>);

/// The write half of a stream; dropped, it ends the stream.
#[derive(Debug)]
pub struct OwnedWriteHalf(Arc<Socket>);

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        // Fails when the connection is over already.
        let _ = self.0.finish();
    }
}

/// A TCP connection.
#[derive(Debug)]
pub struct TcpStream(Arc<Socket>);

/// A connection within a host.
#[derive(Debug)]
pub struct UnixStream(Arc<Socket>);

macro_rules! reads {
    ($($name:ident),*) => {$(
        impl AsyncRead for $name {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                self.0.poll_read(cx, buf)
            }
        }
    )*};
}

macro_rules! writes {
    ($($name:ident),*) => {$(
        impl AsyncWrite for $name {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                self.0.poll_write(cx, bytes)
            }

            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(self.0.finish())
            }
        }
    )*};
}

macro_rules! splits {
    ($($name:ident),*) => {$(
        impl $name {
            /// Two halves, each to be used on its own.
            #[must_use]
            pub fn into_split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
                (OwnedReadHalf(Arc::clone(&self.0)), OwnedWriteHalf(self.0))
            }
        }
    )*};
}

reads!(TcpStream, UnixStream, OwnedReadHalf);
writes!(TcpStream, UnixStream, OwnedWriteHalf);
splits!(TcpStream, UnixStream);

impl TcpStream {
    /// Connects from `host`, from `source` if given.
    ///
    /// # Errors
    /// Refused, unreachable or not answered.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub async fn connect(
        host: &Host,
        remote: SocketAddr,
        source: Option<IpAddr>,
    ) -> io::Result<Self> {
        Socket::connect(host, remote, source, None).await.map(|socket| Self(Arc::new(socket)))
    }

    /// Waits until there is something to read, the end and errors included.
    ///
    /// # Errors
    /// None.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| self.0.poll_readable(cx)).await;
        Ok(())
    }

    /// Waits until something can be written or never can.
    ///
    /// # Errors
    /// None.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|cx| self.0.poll_writable(cx)).await;
        Ok(())
    }

    /// Waits for an error, whatever else is asked for.
    ///
    /// # Errors
    /// None.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn ready(&self, _error: Interest) -> io::Result<()> {
        let has_failed = |end: &End| end.error.is_some();
        poll_fn(|cx| self.0.poll_until(cx, has_failed, |end| &mut end.watchers)).await;
        Ok(())
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// `WouldBlock`, or what ended the connection.
    pub fn try_read_buf(&self, buf: &mut impl BufMut) -> io::Result<usize> {
        let read = self.0.read(buf.remaining_mut())?;
        buf.put_slice(&read);
        Ok(read.len())
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock`, or what ended the connection.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock`, or what ended the connection.
    pub fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut written = 0;
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            match self.0.write(slice) {
                Ok(len) if len == slice.len() => written += len,
                Ok(len) => return Ok(written + len),
                Err(error) if written == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(written)
    }

    /// Ends the stream in this direction.
    ///
    /// # Errors
    /// The connection is over.
    pub fn finish(&self) -> io::Result<()> {
        self.0.finish()
    }

    /// Dropping it resets the connection.
    ///
    /// # Errors
    /// None.
    pub fn set_zero_linger(&self) -> io::Result<()> {
        self.0.change(|end| end.lingers_not = true);
        Ok(())
    }

    /// Gives the connection up when nothing gets through for so long.
    pub fn set_timeout_us(&self, timeout_us: u64) {
        self.0.change(|end| end.timeout_us = timeout_us);
    }

    /// Bytes that were written and have not left.
    #[must_use]
    pub fn unsent(&self) -> usize {
        let mut unsent = 0;
        self.0.change(|end| unsent = end.unsent());
        unsent
    }

    /// This end.
    ///
    /// # Errors
    /// None.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local)
    }

    /// The other end, as this host sees it.
    ///
    /// # Errors
    /// None.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.remote)
    }
}

impl UnixStream {
    /// Connects to the program of `host` that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    ///
    /// # Cancel safety
    /// Dropping the future closes the socket.
    pub async fn connect(host: &Host, path: &Path) -> io::Result<Self> {
        let socket = Socket::connect(host, NOWHERE, None, Some(path)).await?;
        Ok(Self(Arc::new(socket)))
    }
}

/// A listening socket of either kind.
#[derive(Debug)]
struct Listener {
    host: Host,
    id: u64,
    local: SocketAddr,
}

impl Listener {
    fn new(host: &Host, local: SocketAddr, path: Option<&Path>) -> io::Result<Self> {
        host.net.with(|world| {
            let mut local = SocketAddr::new(any_is_v4(local.ip()), local.port());
            if !world.owns(host.id, local.ip()) {
                return Err(io::ErrorKind::AddrNotAvailable.into());
            }
            if local.port() == 0 && path.is_none() {
                local.set_port(world.ephemeral(host.id));
            }
            let id = world.id();
            let state = &mut world.hosts[host.id];
            let is_taken = match path {
                Some(path) => state.unix.contains_key(path),
                None => is_taken(state.tcp.keys(), local.port(), local.ip()),
            };
            if is_taken {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            match path {
                Some(path) => drop(state.unix.insert(path.to_owned(), id)),
                None => drop(state.tcp.insert((local.port(), local.ip()), id)),
            }
            let listener = ListenerState {
                host: host.id,
                owner: host.owner,
                local,
                path: path.map(Path::to_owned),
                waiting: VecDeque::new(),
                wakers: Vec::new(),
            };
            world.listeners.insert(id, listener);
            Ok(Self { host: host.clone(), id, local })
        })
    }

    async fn accept(&self) -> io::Result<Socket> {
        poll_fn(|cx| {
            self.host.net.with(|world| {
                let Some(listener) = world.listeners.get_mut(&self.id) else {
                    return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
                };
                let Some(conn) = listener.waiting.pop_front() else {
                    register(&mut listener.wakers, cx);
                    return Poll::Pending;
                };
                let Some(state) = world.conns.get(&conn) else {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
                };
                let (local, remote) = (state.ends[1].local, state.ends[1].remote);
                Poll::Ready(Ok(Socket { host: self.host.clone(), conn, side: 1, local, remote }))
            })
        })
        .await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.host.net.with(|world| world.listener_close(self.id));
    }
}

/// A listening TCP socket.
#[derive(Debug)]
pub struct TcpListener(Listener);

impl TcpListener {
    /// Listens on an address of `host`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address is another host's, or taken.
    pub fn bind(host: &Host, addr: SocketAddr) -> io::Result<Self> {
        Listener::new(host, addr, None).map(Self)
    }

    /// The next connection, and who made it.
    ///
    /// # Errors
    /// The connection is gone already.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let socket = self.0.accept().await?;
        let remote = socket.remote;
        Ok((TcpStream(Arc::new(socket)), remote))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// None.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local)
    }
}

/// A listening Unix socket.
#[derive(Debug)]
pub struct UnixListener(Listener);

impl UnixListener {
    /// Listens at a path of `host`, which needs no file.
    ///
    /// # Errors
    /// The path is taken.
    pub fn bind(host: &Host, path: &Path) -> io::Result<Self> {
        Listener::new(host, NOWHERE, Some(path)).map(Self)
    }

    /// The next connection.
    ///
    /// # Errors
    /// The connection is gone already.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.0.accept().await.map(|socket| UnixStream(Arc::new(socket)))
    }
}
