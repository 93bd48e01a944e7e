//! An authority and the certificates it gave, as files.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use shoal_proto::vm::MigrationTls;

/// `ca-cert.pem`, and `NAME-cert.pem` and `NAME-key.pem` for each node; the directory is gone with this.
#[derive(Debug)]
pub struct Certificates {
    directory: tempfile::TempDir,
}

impl Certificates {
    /// A new authority, and a certificate for each node: its name is the DNS name in it.
    #[must_use]
    pub fn of(nodes: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let write = |name: &str, pem: &str| {
            fs::write(directory.path().join(name), pem).expect("written");
        };
        let mut params = CertificateParams::new(vec![]).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "shoal tests: authority");
        let key = KeyPair::generate().expect("a key");
        let authority = params.self_signed(&key).expect("signed");
        write("ca-cert.pem", &authority.pem());
        let issuer = Issuer::new(params, key);
        for node in nodes {
            let mut params = CertificateParams::new(vec![(*node).to_owned()]).expect("a DNS name");
            params.distinguished_name.push(DnType::CommonName, *node);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            let key = KeyPair::generate().expect("a key");
            let certificate = params.signed_by(&key, &issuer).expect("signed");
            write(&format!("{node}-cert.pem"), &certificate.pem());
            write(&format!("{node}-key.pem"), &key.serialize_pem());
        }
        Self { directory }
    }

    /// Where they are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// One of the files.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What a VMM on node `own` needs for a migration from or to node `peer`.
    #[must_use]
    pub fn tls(&self, own: &str, peer: &str) -> MigrationTls {
        let path = |name: String| self.file(&name).to_string_lossy().into_owned();
        MigrationTls {
            ca_path: path("ca-cert.pem".into()),
            certificate_path: path(format!("{own}-cert.pem")),
            key_path: path(format!("{own}-key.pem")),
            peer_name: peer.into(),
        }
    }
}
