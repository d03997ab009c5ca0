//! What a client says first, and the frames of a duplex flow.

use std::io::{Error, ErrorKind};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const MAGIC: u32 = 0x464c_4f57;

/// No frame is longer; a longer length is damage.
pub(crate) const FRAME_MAX_BYTES: usize = 64 << 10;

/// What the server is to do with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Answer with the server's name and end.
    Name = 1,
    /// Frames both ways.
    Duplex = 2,
    /// Swallow bytes to their end and answer with what came.
    Up = 3,
    /// Send until the client goes away.
    Down = 4,
    /// Read nothing.
    Stall = 5,
    /// Send back what comes.
    Echo = 6,
}

/// The first 32 bytes of every connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) mode: Mode,
    pub(crate) seed: u64,
    pub(crate) flow: u64,
    /// Bytes a second each way, 0 being as fast as it goes; for [`Mode::Up`] the time that counts, ms.
    pub(crate) rate: u64,
}

impl Header {
    pub(crate) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(32);
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend((self.mode as u32).to_be_bytes());
        for number in [self.seed, self.flow, self.rate] {
            bytes.extend(number.to_be_bytes());
        }
        to.write_all(&bytes).await
    }

    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        if from.read_u32().await? != MAGIC {
            return Err(Error::new(ErrorKind::InvalidData, "no flowgen client"));
        }
        let mode = match from.read_u32().await? {
            1 => Mode::Name,
            2 => Mode::Duplex,
            3 => Mode::Up,
            4 => Mode::Down,
            5 => Mode::Stall,
            6 => Mode::Echo,
            other => return Err(Error::new(ErrorKind::InvalidData, format!("mode {other}"))),
        };
        let (seed, flow) = (from.read_u64().await?, from.read_u64().await?);
        Ok(Self { mode, seed, flow, rate: from.read_u64().await? })
    }
}

/// How one end of a duplex flow saw it, sent as the last frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) wrong: u64,
}

impl Trailer {
    pub(crate) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        to.write_u32(0).await?;
        to.write_u64(self.sent).await?;
        to.write_u64(self.received).await?;
        to.write_u64(self.wrong).await
    }

    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        let sent = from.read_u64().await?;
        let received = from.read_u64().await?;
        Ok(Self { sent, received, wrong: from.read_u64().await? })
    }
}
