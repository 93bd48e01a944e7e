//! Who a node is: its certificate, the authority it trusts, and the name that the other side must have.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use shoal_proto::vm::MigrationTls;

/// A chain of a few certificates, with room to spare.
const MAX_FILE: u64 = 256 << 10;
/// A certificate of the cluster is for migrations only where both sides say so.
const ALPN: &[u8] = b"shoal-migration";

/// What keeps TLS from working, in words for a user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A file that cannot be read.
    #[error("{field}: reading {path}: {why}")]
    File {
        /// Of the request.
        field: &'static str,
        /// Which file.
        path: String,
        /// What the system says.
        why: String,
    },
    /// A file that is not what it should be.
    #[error("{field}: {path}: {why}")]
    Content {
        /// Of the request.
        field: &'static str,
        /// Which file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// A name no certificate can carry.
    #[error("peer_name: '{0}' is not a DNS name that a certificate can carry (not all digits, for one)")]
    PeerName(String),
    /// Signed by somebody else.
    #[error(
        "the certificate of the other side is not signed by the authority in {ca_path}; both nodes need certificates of one authority"
    )]
    Untrusted {
        /// The authority of this side.
        ca_path: String,
    },
    /// Too old.
    #[error("the certificate of the other side has expired; issue a new one (shoal certs issue)")]
    Expired,
    /// Too young.
    #[error("the certificate of the other side is not valid yet; compare the clocks of the two nodes")]
    NotYetValid,
    /// Another node.
    #[error("the other side is node {found}, expected '{expected}'")]
    WrongNode {
        /// Names in its certificate.
        found: String,
        /// The name it should have.
        expected: String,
    },
    /// None at all.
    #[error("the other side showed no certificate")]
    NoCertificate,
    /// TLS 1.2 or something else that is not spoken here.
    #[error("the other side does not offer TLS 1.3 for Shoal migrations: {0}")]
    Downgrade(String),
    /// Not TLS.
    #[error(
        "the other side does not speak TLS; give its node a certificate (shoal certs issue), or use none on this one"
    )]
    NotTls,
    /// The other side does not want this certificate.
    #[error("the other side refused this node's certificate: {0}")]
    Refused(String),
    /// The other side has none.
    #[error("the other side takes plain connections only; give its node a certificate (shoal certs issue)")]
    PlaintextDestination,
    /// Anything else.
    #[error("TLS: {0}")]
    Other(String),
}

/// What one end of a migration needs to prove who it is and to check who the other is. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    peer: ServerName<'static>,
    peer_name: Arc<str>,
    ca_path: Arc<str>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("peer_name", &self.peer_name)
            .field("ca_path", &self.ca_path)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads the files and checks that they fit together.
    ///
    /// # Errors
    /// Which field, which file, and what is wrong with it.
    pub fn load(tls: &MigrationTls) -> Result<Self, TlsError> {
        let peer = ServerName::try_from(tls.peer_name.clone())
            .ok()
            .filter(|name| matches!(name, ServerName::DnsName(_)))
            .ok_or_else(|| TlsError::PeerName(tls.peer_name.chars().take(80).collect()))?;
        let roots = Arc::new(authority("ca_path", &tls.ca_path)?);
        let chain = certificates("certificate_path", &tls.certificate_path)?;
        let key = private_key("key_path", &tls.key_path)?;
        let mismatch = |error: rustls::Error| TlsError::Content {
            field: "key_path",
            path: tls.key_path.clone(),
            why: match error {
                rustls::Error::InconsistentKeys(_) => {
                    format!("not the key of the certificate in {}", tls.certificate_path)
                }
                other => other.to_string(),
            },
        };

        let provider = Arc::new(provider());
        let versions = &[&TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(other)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(mismatch)?;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.alpn_protocols = vec![ALPN.to_vec()];

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| TlsError::Other(error.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(other)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(mismatch)?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![ALPN.to_vec()];

        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            peer,
            peer_name: tls.peer_name.as_str().into(),
            ca_path: tls.ca_path.as_str().into(),
        })
    }

    /// The node that must be at the other end.
    #[must_use]
    pub fn peer_name(&self) -> &str {
        &self.peer_name
    }

    pub(super) fn client(&self) -> Result<rustls::client::UnbufferedClientConnection, TlsError> {
        rustls::client::UnbufferedClientConnection::new(Arc::clone(&self.client), self.peer.clone())
            .map_err(other)
    }

    pub(super) fn server(&self) -> Result<rustls::server::UnbufferedServerConnection, TlsError> {
        rustls::server::UnbufferedServerConnection::new(Arc::clone(&self.server)).map_err(other)
    }

    /// Checks what rustls leaves to the server: that the source is the node expected, not just any of the cluster.
    pub(super) fn check_peer(
        &self,
        certificates: Option<&[CertificateDer<'_>]>,
        protocol: Option<&[u8]>,
    ) -> Result<(), TlsError> {
        let certificate = certificates
            .and_then(<[_]>::first)
            .ok_or(TlsError::NoCertificate)?;
        ParsedCertificate::try_from(certificate)
            .and_then(|parsed| verify_server_name(&parsed, &self.peer))
            .map_err(|error| self.in_words(&error))?;
        if protocol == Some(ALPN) {
            Ok(())
        } else {
            Err(TlsError::Downgrade("it speaks another protocol".into()))
        }
    }

    /// What rustls says, as a user would.
    pub(super) fn in_words(&self, error: &rustls::Error) -> TlsError {
        match error {
            rustls::Error::InvalidCertificate(error) => self.certificate_in_words(error),
            rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
            rustls::Error::PeerIncompatible(why) => TlsError::Downgrade(format!("{why:?}")),
            rustls::Error::NoApplicationProtocol => TlsError::Downgrade("it speaks another protocol".into()),
            rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. } => TlsError::NotTls,
            rustls::Error::AlertReceived(alert) => alert_in_words(*alert),
            error => other(error.clone()),
        }
    }

    fn certificate_in_words(&self, error: &CertificateError) -> TlsError {
        match error {
            // A wrong authority of the right name shows as a wrong signature.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::Untrusted {
                ca_path: self.ca_path.to_string(),
            },
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsError::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                TlsError::NotYetValid
            }
            CertificateError::NotValidForName => self.wrong_node(&[]),
            CertificateError::NotValidForNameContext { presented, .. } => self.wrong_node(presented),
            error => TlsError::Other(format!("certificate of the other side: {error}")),
        }
    }

    /// `presented` is as webpki writes it: `DnsName("a")`.
    fn wrong_node(&self, presented: &[String]) -> TlsError {
        let names = presented.iter().take(3).map(|name| {
            let name = name
                .strip_prefix("DnsName(\"")
                .and_then(|name| name.strip_suffix("\")"))
                .unwrap_or(name);
            format!(
                "'{}'",
                name.chars()
                    .filter(|c| !c.is_control())
                    .take(80)
                    .collect::<String>()
            )
        });
        let found = names.collect::<Vec<_>>().join(", ");
        TlsError::WrongNode {
            found: if found.is_empty() {
                "without a name".into()
            } else {
                found
            },
            expected: self.peer_name.to_string(),
        }
    }
}

fn alert_in_words(alert: AlertDescription) -> TlsError {
    TlsError::Refused(
        match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "it is not signed by the authority that the other side trusts"
            }
            AlertDescription::CertificateExpired => "it has expired, or is not valid yet",
            AlertDescription::CertificateRequired => "none was shown",
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => "it is not one for a node of this cluster",
            AlertDescription::AccessDenied => return TlsError::PlaintextDestination,
            AlertDescription::ProtocolVersion | AlertDescription::NoApplicationProtocol => {
                return TlsError::Downgrade("no common version".into());
            }
            alert => return TlsError::Other(format!("the other side ended it: {alert:?}")),
        }
        .into(),
    )
}

/// AES-128 first: on processors with AES instructions it is the fastest of three that are all strong enough.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn other(error: rustls::Error) -> TlsError {
    TlsError::Other(error.to_string())
}

fn read(field: &'static str, path: &str) -> Result<Vec<u8>, TlsError> {
    let failed = |error: std::io::Error| TlsError::File {
        field,
        path: path.to_owned(),
        why: error.to_string(),
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(content(field, path, "not a regular file"));
    }
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(content(
            field,
            path,
            &format!("over the limit of {} KiB", MAX_FILE >> 10),
        ));
    }
    Ok(bytes)
}

fn content(field: &'static str, path: &str, why: &str) -> TlsError {
    TlsError::Content {
        field,
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

fn certificates(field: &'static str, path: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(field, path)?;
    let chain = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(field, path, &format!("not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(content(
            field,
            path,
            "no certificate in it (-----BEGIN CERTIFICATE-----)",
        ));
    }
    Ok(chain)
}

fn authority(field: &'static str, path: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(field, path)? {
        roots.add(certificate).map_err(|error| {
            content(
                field,
                path,
                &format!("not a certificate of an authority: {error}"),
            )
        })?;
    }
    Ok(roots)
}

fn private_key(field: &'static str, path: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(field, path)?)
        .map_err(|_| content(field, path, "no private key in it (-----BEGIN PRIVATE KEY-----)"))
}
