//! Redemption of tokens, both ends: who issued a token serves, who redeems it dials.

pub(crate) mod applied;
pub(crate) mod client;
mod dial;
pub(crate) mod server;

use std::{io, sync::Arc};

use prost::Message;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Certificates are checked by the system clock.
fn time() -> Arc<dyn TimeProvider> {
    Arc::new(DefaultTimeProvider)
}

/// Reads one message behind its varint length.
///
/// # Errors
/// The stream's, and `InvalidData` for more than `len_max` bytes.
///
/// # Cancel safety
/// Not cancel safe: bytes read are lost; give the connection up.
async fn read_delimited(
    stream: &mut (impl AsyncRead + Unpin),
    len_max: usize,
) -> io::Result<Vec<u8>> {
    let mut len = 0_usize;
    for shift in [0, 7, 14, 21] {
        let byte = stream.read_u8().await?;
        len |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            if len > len_max {
                break;
            }
            let mut message = vec![0; len];
            stream.read_exact(&mut message).await?;
            return Ok(message);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"))
}

/// Writes one message behind its varint length.
///
/// # Errors
/// The stream's.
///
/// # Cancel safety
/// Not cancel safe: part of the message may have been sent; give the connection up.
async fn write_delimited(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    stream.write_all(&message.encode_length_delimited_to_vec()).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use skein_wire::proto::site::Document;

    #[tokio::test]
    async fn messages_are_delimited_and_bounded() {
        let (mut near, mut far) = tokio::io::duplex(1 << 20);
        let message = Document { json: "x".repeat(70_000) };
        write_delimited(&mut near, &message).await.unwrap();
        let read = read_delimited(&mut far, 80_000).await.unwrap();
        assert_eq!(Document::decode(read.as_slice()).unwrap(), message);
        write_delimited(&mut near, &message).await.unwrap();
        assert!(read_delimited(&mut far, 60_000).await.is_err());
        let mut endless: &[u8] = &[0xff; 16];
        assert!(read_delimited(&mut endless, 60_000).await.is_err());
    }
}
