//! `GET /metrics` over HTTP/1.1, and nothing else.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::scheduler::Shared;

const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Connections at a time. One more takes the place of the oldest: silent ones keep nobody out.
const MOST: usize = 64;
/// From accepting a connection to its end.
const LIMIT: Duration = Duration::from_secs(10);

/// Serves until it is dropped. Without a scheduler that leads there are no metrics, and that is said.
pub async fn serve(scheduler: Option<Shared>, listener: TcpListener) {
    // They end with this.
    let mut tasks = JoinSet::new();
    let mut oldest_first = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                while tasks.try_join_next().is_some() {}
                oldest_first.retain(|task: &AbortHandle| !task.is_finished());
                if oldest_first.len() >= MOST
                    && let Some(oldest) = oldest_first.pop_front()
                {
                    oldest.abort();
                }
                let answered = tokio::time::timeout(LIMIT, answer_all(scheduler.clone(), stream));
                oldest_first.push_back(tasks.spawn(async move { drop(answered.await) }));
            }
            Err(error) => {
                tracing::warn!(%error, "metrics: a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer_all(scheduler: Option<Shared>, stream: TcpStream) {
    let service = service_fn(move |request| {
        let response = answer(scheduler.as_ref(), &request);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "metrics: connection");
    }
}

fn answer(scheduler: Option<&Shared>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let words = |status, text: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            let Some(scheduler) = scheduler else {
                return words(StatusCode::SERVICE_UNAVAILABLE, "this scheduler does not lead\n");
            };
            let text = scheduler.metrics.text(scheduler);
            let mut response = Response::new(Full::new(Bytes::from(text)));
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(FORMAT));
            response
        }
        (_, "/metrics") => {
            let mut response = words(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            let headers = response.headers_mut();
            headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        _ => words(StatusCode::NOT_FOUND, "metrics are at /metrics\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Cluster;
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn only_metrics_are_served() {
        let cluster = Cluster::start(1, 1 << 30).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(serve(Some(Arc::clone(&cluster.scheduler)), listener));
        for (request, status, body) in [
            ("GET /metrics", "200", "shoal_migrations_open"),
            ("GET /", "404", "/metrics"),
            ("POST /metrics", "405", "only GET"),
        ] {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            let text = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            stream.write_all(text.as_bytes()).await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("answered");
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(body),
                "{answer}"
            );
        }
    }

    #[tokio::test]
    async fn connections_that_say_nothing_keep_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(serve(None, listener));
        let mut silent = Vec::new();
        for _ in 0..3 * MOST {
            silent.push(TcpStream::connect(address).await.expect("connected"));
        }
        let mut stream = TcpStream::connect(address).await.expect("connected");
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        assert!(answer.contains("does not lead"), "{answer}");
        let mut byte = [0];
        let oldest = silent.first_mut().expect("one").read(&mut byte).await;
        assert!(matches!(oldest, Ok(0) | Err(_)), "it made room: {oldest:?}");
    }
}
