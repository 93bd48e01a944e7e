//! An authority for the certificates that nodes show each other when VMs migrate, kept in a directory of files.
//!
//! `ca.pem` and `ca.key` are the authority. A node's directory has what `shoal agent --migration-tls` expects: `ca.pem`,
//! `cert.pem` and `key.pem`. Keys are ECDSA P-256, in files that only their owner can read.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde::Serialize;
use shoal_proto::NodeName;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::{ASN1Time, X509Certificate};

use crate::error::CliError;

/// What every node needs to check others.
pub const CA: &str = "ca.pem";
/// What makes new certificates; for the operator alone.
pub const CA_KEY: &str = "ca.key";
const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks of nodes differ a little.
const BACKDATED: Duration = Duration::from_secs(60 * 60);
/// Certificates have a few KiB.
const MAX_FILE: u64 = 256 << 10;

/// What is in a certificate that matters here.
#[derive(Debug, Serialize)]
pub struct CertificateView {
    /// Whose it is.
    pub subject: String,
    /// Who says so.
    pub issuer: String,
    /// The nodes it is for.
    pub names: Vec<String>,
    /// It can sign others.
    pub authority: bool,
    /// RFC 3339.
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
    /// At this moment.
    pub valid_now: bool,
    /// SHA-256 of the certificate, in hexadecimal.
    pub sha256: String,
}

/// An authority, open to issue.
pub struct Authority {
    dir: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn failed(what: &str, error: &rcgen::Error) -> CliError {
    CliError::Failed(format!("cannot make {what}: {error}"))
}

fn file_error(path: &Path, what: &str, source: io::Error) -> CliError {
    CliError::File {
        path: path.to_owned(),
        what: what.to_owned(),
        source,
    }
}

fn parameters(name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + now + DAY * days;
    params
}

/// Makes a directory that only its owner can enter, unless it is there already.
fn make_dir(dir: &Path) -> Result<(), CliError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| file_error(dir, "cannot be made", source))
}

/// Writes a file whole or not at all; whoever reads it meanwhile sees the old one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), CliError> {
    let temporary = path.with_extension("new");
    let written = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    written().map_err(|source| file_error(path, "cannot be written", source))
}

fn read(path: &Path) -> Result<String, CliError> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
        Ok(text)
    };
    read().map_err(|source| file_error(path, "cannot be read", source))
}

impl Authority {
    /// A new one in `dir`, which must not have one.
    pub fn create(dir: &Path, days: u32) -> Result<Self, CliError> {
        for file in [CA, CA_KEY] {
            let path = dir.join(file);
            if path.exists() {
                return Err(CliError::Failed(format!(
                    "{} is there already: issue from that authority, or make another in a new directory",
                    path.display()
                )));
            }
        }
        let key = KeyPair::generate().map_err(|error| failed("a key", &error))?;
        // A name of its own, so that an error can say which of two authorities is meant.
        let number = uuid::Uuid::new_v4().simple().to_string();
        let mut params = parameters(&format!("Shoal migrations {}", &number[..8]), days);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params
            .self_signed(&key)
            .map_err(|error| failed("the authority", &error))?;
        make_dir(dir)?;
        write(&dir.join(CA_KEY), &key.serialize_pem(), 0o600)?;
        write(&dir.join(CA), &certificate.pem(), 0o644)?;
        Ok(Self {
            dir: dir.to_owned(),
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        })
    }

    /// The one in `dir`.
    pub fn open(dir: &Path) -> Result<Self, CliError> {
        let unusable = |file: &str, error: rcgen::Error| {
            CliError::Failed(format!(
                "{}: not usable: {error}; `shoal certs init` makes an authority",
                dir.join(file).display()
            ))
        };
        let pem = read(&dir.join(CA))?;
        let key = KeyPair::from_pem(&read(&dir.join(CA_KEY))?).map_err(|error| unusable(CA_KEY, error))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(|error| unusable(CA, error))?;
        let authority = Self {
            dir: dir.to_owned(),
            pem,
            issuer,
        };
        authority.check()?;
        Ok(authority)
    }

    /// Certificates of a key that is not the authority's would be refused by every node.
    fn check(&self) -> Result<(), CliError> {
        let path = self.dir.join(CA);
        let blocks = blocks(&path, &self.pem)?;
        let certificate = parse(&path, &blocks[0])?;
        if certificate.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(self.issuer.key()) {
            return Err(CliError::Failed(format!(
                "{}: not the key of the authority in {CA} beside it",
                self.dir.join(CA_KEY).display()
            )));
        }
        Ok(())
    }

    /// A certificate for a node, good for both ends of a migration, with all it needs, in `out`.
    pub fn issue(&self, node: &NodeName, days: u32, out: &Path) -> Result<(), CliError> {
        // A name all of digits looks like an address to those who check it.
        let last = node.as_str();
        let hexadecimal = last
            .strip_prefix("0x")
            .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_hexdigit()));
        if last.bytes().all(|b| b.is_ascii_digit()) || hexadecimal {
            return Err(CliError::Usage(format!(
                "NODE: '{node}' is a number, which no certificate can carry as a name; give the node another"
            )));
        }
        let mut params = parameters(last, days);
        let name = last
            .try_into()
            .map_err(|error| failed("a certificate of that name", &error))?;
        params.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(|error| failed("a key", &error))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(|error| failed("the certificate", &error))?;
        make_dir(out)?;
        write(&out.join(KEY), &key.serialize_pem(), 0o600)?;
        write(&out.join(CERTIFICATE), &certificate.pem(), 0o644)?;
        write(&out.join(CA), &self.pem, 0o644)
    }
}

fn blocks(path: &Path, text: &str) -> Result<Vec<Pem>, CliError> {
    let broken = || CliError::Failed(format!("{}: no certificate in it (PEM)", path.display()));
    let blocks: Vec<Pem> = Pem::iter_from_buffer(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| broken())?
        .into_iter()
        .filter(|block| block.label == "CERTIFICATE")
        .collect();
    if blocks.is_empty() {
        Err(broken())
    } else {
        Ok(blocks)
    }
}

fn parse<'a>(path: &Path, block: &'a Pem) -> Result<X509Certificate<'a>, CliError> {
    block
        .parse_x509()
        .map_err(|error| CliError::Failed(format!("{}: not a certificate: {error}", path.display())))
}

/// What the certificates in a file say.
pub fn show(path: &Path) -> Result<Vec<CertificateView>, CliError> {
    blocks(path, &read(path)?)?
        .iter()
        .map(|block| Ok(view(&parse(path, block)?, &block.contents)))
        .collect()
}

fn view(certificate: &X509Certificate<'_>, der: &[u8]) -> CertificateView {
    let names = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|extension| extension.value.general_names.iter().map(name).collect());
    let validity = certificate.validity();
    CertificateView {
        subject: printable(&certificate.subject().to_string()),
        issuer: printable(&certificate.issuer().to_string()),
        names: names.unwrap_or_default(),
        authority: certificate.is_ca(),
        not_before: date(validity.not_before),
        not_after: date(validity.not_after),
        valid_now: validity.is_valid(),
        sha256: hexadecimal(der),
    }
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) => printable(name),
        other => printable(&other.to_string()),
    }
}

/// A file may say anything; a terminal obeys control characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn date(time: ASN1Time) -> String {
    let seconds = u64::try_from(time.timestamp()).unwrap_or_default();
    UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .map_or_else(String::new, |time| {
            humantime::format_rfc3339_seconds(time).to_string()
        })
}

fn hexadecimal(der: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(der)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().expect("a name")
    }

    #[test]
    fn what_is_issued_says_whose_it_is_and_keys_are_private() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("authority");
        Authority::create(&dir, 10).expect("made");
        let out = root.path().join("node1");
        Authority::open(&dir)
            .expect("opened")
            .issue(&node("node1"), 5, &out)
            .expect("issued");
        let [authority] = &show(&dir.join(CA)).expect("shown")[..] else {
            panic!("one certificate");
        };
        assert!(authority.authority && authority.valid_now);
        let [certificate] = &show(&out.join(CERTIFICATE)).expect("shown")[..] else {
            panic!("one certificate");
        };
        assert_eq!(certificate.names, ["node1"]);
        assert_eq!(certificate.issuer, authority.subject);
        assert!(!certificate.authority && certificate.valid_now);
        assert!(certificate.not_after < authority.not_after);
        for key in [dir.join(CA_KEY), out.join(KEY)] {
            let mode = fs::metadata(&key).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", key.display());
            assert!(show(&key).is_err(), "a key is not shown");
        }
        assert_eq!(
            fs::read(out.join(CA)).expect("there"),
            fs::read(dir.join(CA)).expect("there")
        );
    }

    #[test]
    fn an_authority_is_not_overwritten_and_a_wrong_key_is_noticed() {
        let root = tempfile::tempdir().expect("a directory");
        let (one, two) = (root.path().join("one"), root.path().join("two"));
        Authority::create(&one, 1).expect("made");
        Authority::create(&two, 1).expect("made");
        assert!(Authority::create(&one, 1).is_err());
        fs::copy(two.join(CA_KEY), one.join(CA_KEY)).expect("copied");
        let error = Authority::open(&one).err().expect("refused").to_string();
        assert!(error.contains("not the key of the authority"), "{error}");
        assert!(Authority::open(root.path()).is_err());
    }

    #[test]
    fn a_number_is_no_name() {
        let root = tempfile::tempdir().expect("a directory");
        let authority = Authority::create(root.path(), 1).expect("made");
        for name in ["1", "0x1f", "0x"] {
            assert!(
                authority.issue(&node(name), 1, &root.path().join("out")).is_err(),
                "{name}"
            );
        }
    }
}
