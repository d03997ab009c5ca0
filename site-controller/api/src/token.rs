//! The token: what one site hands to another so that it can link.
//!
//! A text file that survives mail and chat:
//!
//! ```text
//! SKEIN-TOKEN-1
//! # Links a site to "hub". Keep it secret.
//! eyJlbmRwb2ludHMiOlsiMjAzLjAuMTEzLjc6NzQ0MyJdLCJpc3N1ZXIiOiJhYWFhYWFhYWFhYWFhYWFhYWFh
//! YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhIn0
//! END 5d3b1f09
//! ```
//!
//! The body is base64url (no padding) of a JSON object; `END` carries the CRC-32 of the decoded bytes, so that a file cut
//! short or mangled on its way is told apart from a wrong one. It contains a code, never a key.

use std::{fmt, str::FromStr};

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};
use skein_core::SiteId;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::{link::LINK_ENDPOINTS_MAX, value::HostPort};

/// Fewest bytes of a code: 128 bits cannot be guessed.
pub const CODE_LEN_MIN: usize = 16;
/// Most bytes of a code; more adds nothing.
const CODE_LEN_MAX: usize = 64;
/// Most bytes of a token file: sixteen endpoints with the longest host names fit.
pub const TOKEN_LEN_MAX: usize = 16 * 1024;
const MAGIC: &str = "SKEIN-TOKEN-";
const VERSION: u32 = 1;
const LINE_LEN: usize = 76;

/// The secret of a token. Never shown by `Debug`, wiped when dropped.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Code(Vec<u8>);

impl Code {
    /// Takes at least [`CODE_LEN_MIN`] random bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (CODE_LEN_MIN..=CODE_LEN_MAX).contains(&bytes.len()).then_some(Self(bytes))
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code(…)")
    }
}

/// The content of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// `HOST:PORT` of the issuing site, tried in parallel.
    pub endpoints: Vec<String>,
    /// Site id of the issuer.
    pub issuer: SiteId,
    /// Name of the issuer, for people.
    pub issuer_name: String,
    /// SHA-256 of the issuer's CA certificate (DER); the claim trusts nothing else.
    pub ca_sha256: [u8; 32],
    /// The secret that is redeemed.
    pub code: Code,
    /// The network the redeemer joins.
    pub network: SiteId,
    /// When the grant expires, seconds since 1970.
    pub expires_unix_s: i64,
    /// How many sites may redeem it.
    pub uses: u32,
    /// Cost of the link.
    pub cost: u32,
    /// Whether the redeemer becomes a guest.
    pub guest: bool,
}

/// Why a text is not a usable token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Nothing in it.
    #[error("the token is empty")]
    Empty,
    /// More than [`TOKEN_LEN_MAX`] bytes.
    #[error("the token is longer than {TOKEN_LEN_MAX} bytes, so it is something else")]
    TooLong,
    /// The end is missing.
    #[error("the token is cut short: its last line is missing; copy the whole file")]
    Truncated,
    /// The content does not match its checksum or its encoding.
    #[error("the token is damaged ({0}); copy the file again")]
    Garbled(&'static str),
    /// Another program's file.
    #[error("this is {0}, not a Skein token; make one with `skctl token create`")]
    Foreign(&'static str),
    /// A version of the format this program does not know.
    #[error("the token has format version {0}; upgrade this site first")]
    FutureVersion(u32),
    /// The grant's time is over.
    #[error("the token expired at {0}; make a new one with `skctl token create`")]
    Expired(String),
}

impl Token {
    /// Checks the expiry against `now_unix_s`, written as `expired_at` in the error.
    ///
    /// # Errors
    /// [`TokenError::Expired`].
    pub fn check_expiry(&self, now_unix_s: i64, expired_at: &str) -> Result<(), TokenError> {
        if now_unix_s >= self.expires_unix_s {
            return Err(TokenError::Expired(expired_at.to_owned()));
        }
        Ok(())
    }

    /// The token file.
    #[must_use]
    pub fn encode(&self) -> String {
        let body = Body {
            endpoints: self.endpoints.clone(),
            issuer: self.issuer.to_string(),
            issuer_name: self.issuer_name.clone(),
            ca_sha256: BASE64URL_NOPAD.encode(&self.ca_sha256),
            code: BASE64URL_NOPAD.encode(self.code.expose()),
            network: self.network.to_string(),
            expires: self.expires_unix_s,
            uses: self.uses,
            cost: self.cost,
            guest: self.guest,
        };
        let json = serde_json::to_vec(&body).expect("invariant: a token has string keys only");
        let name: String = self.issuer_name.chars().filter(|c| !c.is_control()).take(64).collect();
        let mut out = format!("{MAGIC}{VERSION}\n# Links a site to {name:?}. Keep it secret.\n");
        let encoded = BASE64URL_NOPAD.encode(&json);
        for line in encoded.as_bytes().chunks(LINE_LEN) {
            out.push_str(std::str::from_utf8(line).expect("invariant: base64 is ASCII"));
            out.push('\n');
        }
        out.push_str(&format!("END {:08x}\n", crc32(&json)));
        out
    }

    /// Whether `text` begins like a token: for telling a token from a file name.
    #[must_use]
    pub fn looks_like(text: &str) -> bool {
        text.trim_start().starts_with(MAGIC)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        if text.len() > TOKEN_LEN_MAX {
            return Err(foreign(text).unwrap_or(TokenError::TooLong));
        }
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            return Err(TokenError::Empty);
        }
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default();
        check_header(first, text)?;
        let mut encoded = String::new();
        let mut checksum = None;
        for line in lines.filter(|line| !line.starts_with('#')) {
            if checksum.is_some() {
                return Err(TokenError::Garbled("text after its end"));
            }
            match line.strip_prefix("END ") {
                Some(sum) => checksum = Some(sum.trim()),
                None => encoded.push_str(line),
            }
        }
        let checksum = checksum.filter(|sum| sum.len() == 8).ok_or(TokenError::Truncated)?;
        let checksum = u32::from_str_radix(checksum, 16)
            .map_err(|_| TokenError::Garbled("its checksum is not a number"))?;
        let mut json = BASE64URL_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| TokenError::Garbled("its content is not base64url"))?;
        if crc32(&json) != checksum {
            return Err(TokenError::Garbled("its checksum does not match"));
        }
        let body = serde_json::from_slice::<Body>(&json)
            .map_err(|_| TokenError::Garbled("a field is missing or has the wrong type"));
        json.zeroize();
        body?.into_token()
    }
}

fn check_header(first: &str, text: &str) -> Result<(), TokenError> {
    let Some(version) = first.strip_prefix(MAGIC) else {
        return Err(foreign(text).unwrap_or(TokenError::Foreign("some other text")));
    };
    match version.parse::<u32>() {
        Ok(VERSION) => Ok(()),
        Ok(version) if version > VERSION => Err(TokenError::FutureVersion(version)),
        _ if MAGIC.len() + version.len() == text.len() && version.is_empty() => {
            Err(TokenError::Truncated)
        }
        _ => Err(TokenError::Garbled("its first line is unreadable")),
    }
}

/// Names what people hand over by mistake.
fn foreign(text: &str) -> Option<TokenError> {
    let text = text.trim_start();
    let head: String = text.chars().take(4096).collect();
    let what = if head.contains("skupper.io/") {
        "a Skupper document"
    } else if head.starts_with("-----BEGIN") {
        "a PEM file (a certificate or key)"
    } else if head.starts_with("ssh-") {
        "an SSH public key"
    } else if head.starts_with('{') || head.starts_with('[') {
        "a JSON document"
    } else if head.starts_with("<!") || head.starts_with("<html") || head.starts_with('<') {
        "a web page"
    } else if head.contains("apiVersion:") {
        "a YAML document (use `skctl apply -f`)"
    } else if !head.is_empty() && MAGIC.starts_with(head.trim_end()) {
        return Some(TokenError::Truncated);
    } else {
        return None;
    };
    Some(TokenError::Foreign(what))
}

/// Field names of the JSON in the body; unknown ones are ignored, so that later versions can add.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    endpoints: Vec<String>,
    issuer: String,
    #[serde(default)]
    issuer_name: String,
    ca_sha256: String,
    code: String,
    network: String,
    expires: i64,
    #[serde(default = "one")]
    uses: u32,
    #[serde(default = "one")]
    cost: u32,
    #[serde(default)]
    guest: bool,
}

const fn one() -> u32 {
    1
}

impl Body {
    fn into_token(mut self) -> Result<Token, TokenError> {
        let code = BASE64URL_NOPAD.decode(self.code.as_bytes()).ok().and_then(Code::new);
        self.code.zeroize();
        let ca = BASE64URL_NOPAD.decode(self.ca_sha256.as_bytes()).ok();
        let endpoint_ok =
            |text: &String| text.parse::<HostPort>().is_ok_and(|endpoint| endpoint.port.is_some());
        let endpoints_ok = (1..=LINK_ENDPOINTS_MAX).contains(&self.endpoints.len())
            && self.endpoints.iter().all(endpoint_ok);
        if !endpoints_ok {
            return Err(TokenError::Garbled("its endpoints are unusable"));
        }
        let mut issuer_name = self.issuer_name;
        issuer_name.retain(|c| !c.is_control());
        Ok(Token {
            endpoints: self.endpoints,
            issuer: SiteId::parse(&self.issuer)
                .ok_or(TokenError::Garbled("its issuer is no site id"))?,
            issuer_name,
            ca_sha256: ca
                .and_then(|ca| ca.try_into().ok())
                .ok_or(TokenError::Garbled("its CA pin is unusable"))?,
            code: code.ok_or(TokenError::Garbled("its code is unusable"))?,
            network: SiteId::parse(&self.network)
                .ok_or(TokenError::Garbled("its network is no site id"))?,
            expires_unix_s: self.expires,
            uses: self.uses,
            cost: self.cost.max(1),
            guest: self.guest,
        })
    }
}

/// CRC-32 (IEEE 802.3): finds what copying breaks; whoever forges a token gains nothing from a better sum.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            let mask = (crc & 1).wrapping_neg();
            crc = (crc >> 1) ^ (0xedb8_8320 & mask);
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token {
            endpoints: vec!["203.0.113.7:7443".into(), "[2001:db8::1]:7443".into()],
            issuer: SiteId([7; 32]),
            issuer_name: "hub".into(),
            ca_sha256: [9; 32],
            code: Code::new(vec![3; 20]).unwrap(),
            network: SiteId([8; 32]),
            expires_unix_s: 1_800_000_000,
            uses: 1,
            cost: 1,
            guest: false,
        }
    }

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_is_encoded_parses_also_with_other_line_ends() {
        let text = token().encode();
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(text.replace('\n', "\r\n").parse(), Ok(token()));
        assert_eq!(format!("\u{feff}\n  {}\n\n", text.replace('\n', "\n  ")).parse(), Ok(token()));
    }

    #[test]
    fn every_cut_is_noticed() {
        let text = token().encode();
        for len in 0..text.trim_end().len() {
            let error = text[..len].parse::<Token>().unwrap_err();
            let expected = matches!(error, TokenError::Truncated | TokenError::Empty)
                || (len < MAGIC.len() + 2 && matches!(error, TokenError::Garbled(_)));
            assert!(expected, "{len}: {error}");
        }
    }

    #[test]
    fn every_changed_character_is_noticed() {
        let text = token().encode();
        let body = text.find("Keep it secret.").unwrap() + 16;
        for at in body..text.trim_end().len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at].eq_ignore_ascii_case(&b'A') { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(changed.parse::<Token>().is_err(), "byte {at}");
        }
    }

    #[test]
    fn other_formats_are_named() {
        let cases = [
            ("-----BEGIN CERTIFICATE-----\nMII", "PEM"),
            ("{\"a\":1}", "JSON"),
            ("apiVersion: skupper.io/v2alpha1\nkind: AccessToken", "Skupper"),
            ("apiVersion: v1\nkind: Secret", "YAML"),
            ("<!DOCTYPE html>", "web page"),
            ("hello", "some other text"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<Token>().unwrap_err();
            assert!(matches!(error, TokenError::Foreign(_)), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        let future = token().encode().replace("SKEIN-TOKEN-1", "SKEIN-TOKEN-2");
        assert_eq!(future.parse::<Token>(), Err(TokenError::FutureVersion(2)));
        assert_eq!("x".repeat(20_000).parse::<Token>(), Err(TokenError::TooLong));
        assert_eq!(" \n".parse::<Token>(), Err(TokenError::Empty));
    }

    #[test]
    fn expiry_is_inclusive() {
        assert!(token().check_expiry(1_799_999_999, "then").is_ok());
        let expired = TokenError::Expired("then".into());
        assert_eq!(token().check_expiry(1_800_000_000, "then"), Err(expired));
    }

    #[test]
    fn debug_hides_the_code() {
        assert!(!format!("{:?}", token()).contains("3, 3"));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".*") {
            prop_assert!(text.parse::<Token>().is_err());
        }

        #[test]
        fn damaged_bodies_never_panic(body in "[A-Za-z0-9_-]{0,200}", sum: u32) {
            let text = format!("SKEIN-TOKEN-1\n{body}\nEND {sum:08x}\n");
            prop_assert!(text.parse::<Token>().is_err());
        }
    }
}
