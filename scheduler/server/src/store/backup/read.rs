//! Reads a backup file, and refuses one that is not whole.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::super::backend::{Placed, Table};
use super::super::{SCHEMA_VERSION, records};
use super::{BackupError, END, FORMAT, Header, MAGIC, MAX_HEADER, MAX_KEY, MAX_VALUE, RECORD, Summary};

/// A backup whose header was read.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    digest: Sha256,
    /// Of its own account.
    pub header: Header,
    summary: Summary,
    ended: bool,
}

impl Reader {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| BackupError::Io {
            file: name.clone(),
            source,
        })?;
        let mut reader = Self {
            path: path.to_owned(),
            file: BufReader::new(file),
            digest: Sha256::new(),
            header: Header {
                schema: 0,
                term: 0,
                created_unix_ms: 0,
                store: String::new(),
            },
            summary: Summary::default(),
            ended: false,
        };
        if reader.bytes(MAGIC.len(), "the header").ok().as_deref() != Some(MAGIC) {
            return Err(BackupError::NoBackup { file: name });
        }
        let newer = |what, found, known| {
            Err(BackupError::Newer {
                file: name.clone(),
                what,
                found,
                known,
            })
        };
        let format = reader.number("the header")?;
        match format {
            FORMAT => {}
            format if format > FORMAT => {
                return newer("format version", u64::from(format), u64::from(FORMAT));
            }
            _ => return Err(reader.damaged("the format version")),
        }
        let length = reader.number("the header")?;
        if length > MAX_HEADER {
            return Err(reader.damaged("the length of the header"));
        }
        let header = reader.bytes(length as usize, "the header")?;
        reader.header = serde_json::from_slice(&header).map_err(|_| reader.damaged("the header"))?;
        match reader.header.schema {
            SCHEMA_VERSION => Ok(reader),
            found if found > SCHEMA_VERSION => newer("schema version", found, SCHEMA_VERSION),
            _ => Err(reader.damaged("the schema version")),
        }
    }

    /// Reads all of a file, and answers what is in it if all is well.
    pub fn check(path: &Path) -> Result<(Header, Summary), BackupError> {
        let mut reader = Self::open(path)?;
        while reader.next()?.is_some() {}
        let mut summary = reader.summary;
        summary.bytes = reader
            .file
            .get_ref()
            .metadata()
            .map_err(|source| reader.io(source))?
            .len();
        Ok((reader.header, summary))
    }

    /// The next record; none after the last, which the digest has proved to be the last.
    pub fn next(&mut self) -> Result<Option<Placed>, BackupError> {
        if self.ended {
            return Ok(None);
        }
        let number = self.summary.records + 1;
        let part = format!("record {number}");
        match self.bytes(1, &part)?.as_slice() {
            [RECORD] => {}
            [END] => return self.end().map(|()| None),
            _ => return Err(self.damaged(&part)),
        }
        let name_length = self.bytes(1, &part)?;
        let (key_length, value_length) = (self.number(&part)?, self.number(&part)?);
        if key_length > MAX_KEY || value_length > MAX_VALUE {
            return Err(self.damaged(&format!("the length of {part}")));
        }
        let name = self.bytes(usize::from(name_length.first().copied().unwrap_or(0)), &part)?;
        let table = Table::ALL
            .into_iter()
            .find(|table| table.name().as_bytes() == name);
        let Some(table) = table else {
            return Err(self.damaged(&format!("the name of the table of {part}")));
        };
        let part = format!("{part}, of table '{}',", table.name());
        let key = self.bytes(key_length as usize, &part)?;
        let value = self.bytes(value_length as usize, &part)?;
        if !records::check(table, &key, &value) {
            return Err(self.damaged(&part));
        }
        self.summary.count(table);
        Ok(Some((table, key, value)))
    }

    fn end(&mut self) -> Result<(), BackupError> {
        let part = "the end";
        let records = self.bytes(8, part)?;
        if records != self.summary.records.to_le_bytes() {
            return Err(self.damaged("the number of records"));
        }
        let digest = self.digest.clone().finalize();
        if self.bytes(digest.len(), part)? != digest.as_slice() {
            return Err(self.damaged("a record, or the checksum of all,"));
        }
        let mut more = [0];
        match self.file.read(&mut more).map_err(|source| self.io(source))? {
            0 => {
                self.ended = true;
                Ok(())
            }
            _ => Err(self.damaged("what follows its end")),
        }
    }

    fn number(&mut self, part: &str) -> Result<u32, BackupError> {
        let bytes = self.bytes(4, part)?;
        let bytes: [u8; 4] = bytes.try_into().map_err(|_| self.damaged(part))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn bytes(&mut self, length: usize, part: &str) -> Result<Vec<u8>, BackupError> {
        let mut bytes = Vec::new();
        let wanted = length as u64;
        (&mut self.file)
            .take(wanted)
            .read_to_end(&mut bytes)
            .map_err(|source| self.io(source))?;
        if bytes.len() < length {
            return Err(BackupError::Truncated {
                file: self.path.display().to_string(),
                part: part.to_owned(),
            });
        }
        self.digest.update(&bytes);
        Ok(bytes)
    }

    fn damaged(&self, part: &str) -> BackupError {
        BackupError::Damaged {
            file: self.path.display().to_string(),
            part: part.to_owned(),
        }
    }

    fn io(&self, source: std::io::Error) -> BackupError {
        BackupError::Io {
            file: self.path.display().to_string(),
            source,
        }
    }
}
