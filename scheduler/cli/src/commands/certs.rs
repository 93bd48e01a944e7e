//! `shoal certs init`, `shoal certs issue` and `shoal certs show`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use shoal_proto::NodeName;

use crate::certificates::{Authority, CA, CertificateView, show};
use crate::client::Context;
use crate::error::CliError;
use crate::page::Page;

/// What to do with certificates.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// Make an authority: ca.pem, and ca.key, which stays with you.
    Init(InitArgs),
    /// Issue a node's certificate: ca.pem, cert.pem and key.pem, for `shoal agent --migration-tls`.
    Issue(IssueArgs),
    /// Show what a certificate says.
    Show(ShowArgs),
}

/// Arguments of `certs init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Directory of the authority; made if missing.
    pub dir: PathBuf,
    /// How long it is valid.
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
}

/// Arguments of `certs issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Directory of the authority.
    pub dir: PathBuf,
    /// The node's name in the cluster.
    pub node: NodeName,
    /// Where the files go; otherwise a directory of the node's name beside the authority's files.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// How long it is valid.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
}

/// Arguments of `certs show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// A file of certificates.
    pub file: PathBuf,
}

#[derive(Debug, Serialize)]
struct Made {
    dir: PathBuf,
    certificate: CertificateView,
}

/// Does it; no cluster is needed.
pub fn run(context: &Context, command: CertsCommand) -> Result<(), CliError> {
    match command {
        CertsCommand::Init(args) => {
            Authority::create(&args.dir, args.days)?;
            made(context, args.dir, CA, |made| {
                format!(
                    "made an authority in {}, valid until {}; keep ca.key to yourself",
                    made.dir.display(),
                    made.certificate.not_after
                )
            })
        }
        CertsCommand::Issue(args) => {
            let out = args.out.unwrap_or_else(|| args.dir.join(args.node.as_str()));
            Authority::open(&args.dir)?.issue(&args.node, args.days, &out)?;
            made(context, out, "cert.pem", |made| {
                format!(
                    "issued a certificate for {}, valid until {}; on that node: shoal agent --migration-tls {}",
                    made.certificate.names.join(", "),
                    made.certificate.not_after,
                    made.dir.display()
                )
            })
        }
        CertsCommand::Show(args) => context.output.show(&show(&args.file)?, |views| {
            let mut page = Page::default();
            for (number, view) in views.iter().enumerate() {
                if number > 0 {
                    page.blank();
                }
                page.add(text(view));
            }
            page
        }),
    }
}

fn made(
    context: &Context,
    dir: PathBuf,
    file: &str,
    human: impl FnOnce(&Made) -> String,
) -> Result<(), CliError> {
    let certificate = show(&dir.join(file))?.swap_remove(0);
    context.output.show(&Made { dir, certificate }, human)
}

fn text(view: &CertificateView) -> Page {
    let names = if view.names.is_empty() {
        "none".to_owned()
    } else {
        view.names.join(", ")
    };
    let now = if view.valid_now {
        "valid now"
    } else {
        "NOT valid now"
    };
    let kind = if view.authority {
        "an authority"
    } else {
        "a node's"
    };
    Page::from_iter([
        format!("subject  {} ({kind})", view.subject),
        format!("issuer   {}", view.issuer),
        format!("nodes    {names}"),
        format!("valid    {} to {} ({now})", view.not_before, view.not_after),
        format!("sha256   {}", view.sha256),
    ])
}
