//! The node's certificate for migrations: three files in one directory, read by the VMMs at each migration, so that new
//! files take effect without a restart. Here they are only checked, when the agent starts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use shoal_proto::{NodeName, vm};

/// A chain of a few certificates, with room to spare; the VMM's limit too.
const MAX_FILE: u64 = 256 << 10;

/// Where the certificate of this node is.
#[derive(Debug, Clone)]
pub(crate) struct MigrationCertificates {
    ca: String,
    certificate: String,
    key: String,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// A file that cannot be read.
    #[error(
        "migration_tls: reading {path}: {source}; `shoal certs issue` writes ca.pem, cert.pem and key.pem"
    )]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("migration_tls: {path}: {why}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

fn content(path: &Path, why: impl Into<String>) -> CertificatesError {
    CertificatesError::Content {
        path: path.to_owned(),
        why: why.into(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CertificatesError> {
    let failed = |source| CertificatesError::File {
        path: path.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        let limit = MAX_FILE >> 10;
        return Err(content(
            path,
            format!("not a regular file of at most {limit} KiB"),
        ));
    }
    std::fs::read(path).map_err(failed)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificatesError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| content(path, format!("not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(content(path, "no certificate in it"));
    }
    Ok(chain)
}

impl MigrationCertificates {
    /// Checks that the files fit together, and fit this node, today.
    pub(crate) fn open(dir: &Path, node: &NodeName) -> Result<Self, CertificatesError> {
        let dir = dir.canonicalize().map_err(|source| CertificatesError::File {
            path: dir.to_owned(),
            source,
        })?;
        let [ca, certificate, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| dir.join(file));
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots
                .add(root)
                .map_err(|error| content(&ca, format!("not a certificate of an authority: {error}")))?;
        }
        let chain = certificates(&certificate)?;
        check_key(&key, &certificate, &chain)?;
        check_chain(&ca, &certificate, roots, &chain, node)?;
        let text = |path: PathBuf| {
            path.to_str()
                .map(str::to_owned)
                .ok_or_else(|| content(&path, "the path is not valid UTF-8"))
        };
        Ok(Self {
            ca: text(ca)?,
            certificate: text(certificate)?,
            key: text(key)?,
        })
    }

    /// What a VMM is told when it is to migrate to or from that node.
    pub(crate) fn with_peer(&self, node: &str) -> vm::MigrationTls {
        vm::MigrationTls {
            ca_path: self.ca.clone(),
            certificate_path: self.certificate.clone(),
            key_path: self.key.clone(),
            peer_name: node.to_owned(),
        }
    }
}

fn check_key(
    path: &Path,
    certificate: &Path,
    chain: &[CertificateDer<'static>],
) -> Result<(), CertificatesError> {
    let key =
        PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|_| content(path, "no private key in it"))?;
    let key = ring::sign::any_supported_type(&key)
        .map_err(|error| content(path, format!("not a usable private key: {error}")))?;
    CertifiedKey::new(chain.to_vec(), key).keys_match().map_err(|_| {
        content(
            path,
            format!("not the key of the certificate in {}", certificate.display()),
        )
    })
}

/// As the nodes at the other end will, in both roles.
fn check_chain(
    ca: &Path,
    path: &Path,
    roots: RootCertStore,
    chain: &[CertificateDer<'static>],
    node: &NodeName,
) -> Result<(), CertificatesError> {
    let in_words = |error: rustls::Error| {
        use CertificateError as E;
        let why = match error {
            rustls::Error::InvalidCertificate(E::UnknownIssuer | E::BadSignature) => {
                format!("not signed by the authority in {}", ca.display())
            }
            rustls::Error::InvalidCertificate(E::Expired | E::ExpiredContext { .. }) => {
                "has expired; issue a new one (shoal certs issue)".into()
            }
            rustls::Error::InvalidCertificate(E::NotValidYet | E::NotValidYetContext { .. }) => {
                "is not valid yet; check the clock".into()
            }
            rustls::Error::InvalidCertificate(E::NotValidForName | E::NotValidForNameContext { .. }) => {
                format!("is not for node '{node}'; issue one with `shoal certs issue DIR {node}`")
            }
            other => other.to_string(),
        };
        content(path, why)
    };
    let name = ServerName::try_from(node.as_str()).map_err(|_| {
        content(path, format!("no certificate can carry the node name '{node}'; one with a letter other than hexadecimal can"))
    })?;
    let [own, intermediates @ ..] = chain else {
        return Err(content(path, "no certificate in it"));
    };
    let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
    let unusable = |error: rustls::server::VerifierBuilderError| content(ca, error.to_string());
    WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
        .build()
        .map_err(unusable)?
        .verify_server_cert(own, intermediates, &name, &[], UnixTime::now())
        .map_err(in_words)?;
    WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(unusable)?
        .verify_client_cert(own, intermediates, UnixTime::now())
        .map_err(in_words)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    use tempfile::TempDir;

    use super::*;

    struct Authority {
        dir: TempDir,
        pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new(vec![]).expect("no names");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().expect("a key");
            let pem = params.self_signed(&key).expect("signed").pem();
            Self {
                dir: tempfile::tempdir().expect("a directory"),
                pem,
                issuer: Issuer::new(params, key),
            }
        }

        fn issue(&self, node: &str, change: impl FnOnce(&mut CertificateParams)) -> &Path {
            let mut params = CertificateParams::new(vec![node.to_owned()]).expect("a name");
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            change(&mut params);
            let key = KeyPair::generate().expect("a key");
            let certificate = params.signed_by(&key, &self.issuer).expect("signed");
            self.write("ca.pem", &self.pem);
            self.write("cert.pem", &certificate.pem());
            self.write("key.pem", &key.serialize_pem());
            self.dir.path()
        }

        fn write(&self, file: &str, text: &str) {
            std::fs::write(self.dir.path().join(file), text).expect("written");
        }
    }

    fn refusal(dir: &Path) -> String {
        let node = "node1".parse().expect("a name");
        MigrationCertificates::open(dir, &node)
            .expect_err("refused")
            .to_string()
    }

    #[test]
    fn good_files_are_passed_on_by_their_absolute_paths() {
        let authority = Authority::new();
        let dir = authority.issue("node1", |_| ());
        let opened = MigrationCertificates::open(dir, &"node1".parse().expect("a name")).expect("good");
        let tls = opened.with_peer("node2");
        assert_eq!(tls.peer_name, "node2");
        for path in [&tls.ca_path, &tls.certificate_path, &tls.key_path] {
            assert!(
                Path::new(path).is_absolute() && Path::new(path).is_file(),
                "{path}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let authority = Authority::new();
        let error = refusal(authority.issue("node2", |_| ()));
        assert!(error.contains("cert.pem: is not for node 'node1'"), "{error}");
        let error = refusal(authority.issue("node1", |params| {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }));
        assert!(error.contains("cert.pem: has expired"), "{error}");
        let error = refusal(authority.issue("node1", |params| {
            params.not_before = rcgen::date_time_ymd(2100, 1, 1);
        }));
        assert!(error.contains("cert.pem: is not valid yet"), "{error}");
        let dir = authority.issue("node1", |params| params.extended_key_usages.truncate(1));
        assert!(refusal(dir).contains("cert.pem: "), "for servers only");

        let dir = authority.issue("node1", |_| ());
        authority.write("key.pem", &KeyPair::generate().expect("a key").serialize_pem());
        let error = refusal(dir);
        assert!(
            error.contains("key.pem: not the key of the certificate in"),
            "{error}"
        );

        let dir = authority.issue("node1", |_| ());
        authority.write("ca.pem", &Authority::new().pem);
        let error = refusal(dir);
        assert!(
            error.contains("cert.pem: not signed by the authority in"),
            "{error}"
        );

        authority.write("ca.pem", "");
        assert!(refusal(dir).contains("ca.pem: no certificate in it"));
        std::fs::remove_file(dir.join("ca.pem")).expect("removed");
        assert!(refusal(dir).contains("ca.pem"));
    }
}
