//! Where a destination listens.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `sun_path` of `sockaddr_un`, less its final zero.
const MAX_UNIX_PATH: usize = 107;
const UNIX: &str = "unix:";

/// Where a destination listens: `IP:PORT`, or `unix:/PATH` on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Over the network.
    Tcp(SocketAddr),
    /// Within this host.
    Unix(PathBuf),
}

/// Why a string is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither form.
    #[error("address '{0}' is neither IP:PORT (with [] around IPv6) nor unix:/PATH")]
    Form(String),
    /// A path relative to who knows what.
    #[error("address '{0}': the path after 'unix:' must be absolute")]
    Relative(String),
    /// A path no socket can have.
    #[error(
        "address: the path after 'unix:' has {0} bytes, more than the {MAX_UNIX_PATH} a socket's path may have"
    )]
    TooLong(usize),
    /// A zero byte.
    #[error("address: a zero byte in the path after 'unix:'")]
    Zero,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let shown = || text.chars().filter(|c| !c.is_control()).take(120).collect();
        let Some(path) = text.strip_prefix(UNIX) else {
            return text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| AddressError::Form(shown()));
        };
        if path.len() > MAX_UNIX_PATH {
            Err(AddressError::TooLong(path.len()))
        } else if path.contains('\0') {
            Err(AddressError::Zero)
        } else if Path::new(path).is_absolute() {
            Ok(Self::Unix(path.into()))
        } else {
            Err(AddressError::Relative(shown()))
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["127.0.0.1:0", "[::1]:7001", "unix:/run/shoal/m.sock"] {
            assert_eq!(text.parse::<Address>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, says) in [
            ("node1:7001", "neither IP:PORT"),
            ("", "neither IP:PORT"),
            ("unix:m.sock", "must be absolute"),
            ("unix:", "must be absolute"),
            ("unix:/a\0b", "zero byte"),
        ] {
            let error = text.parse::<Address>().expect_err(text).to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let long = format!("unix:/{}", "a".repeat(MAX_UNIX_PATH));
        assert_eq!(long.parse::<Address>(), Err(AddressError::TooLong(108)));
        assert!(long[..long.len() - 1].parse::<Address>().is_ok());
    }
}
