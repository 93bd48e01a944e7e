//! The gRPC API explains itself: reflection and health, for grpcurl and for load balancers.

use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::machine::Machine;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

#[test]
fn the_cluster_api_has_reflection_and_health() {
    let cluster = Cluster::start(Machine::exclusive(), &Shape::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let endpoint = cluster.shoal.endpoint().to_owned();
        let channel = Channel::from_shared(endpoint)
            .expect("an endpoint")
            .connect()
            .await
            .expect("connected");

        let names = service_names(channel.clone()).await;
        assert!(
            names.iter().any(|name| name == "shoal.cluster.v1.Cluster"),
            "{names:?}"
        );

        let mut health = HealthClient::new(channel);
        for service in ["", "shoal.cluster.v1.Cluster"] {
            let answer = health
                .check(HealthCheckRequest {
                    service: service.into(),
                })
                .await
                .expect("an answer");
            assert_eq!(
                answer.into_inner().status(),
                ServingStatus::Serving,
                "'{service}'"
            );
        }
    });
}

async fn service_names(channel: Channel) -> Vec<String> {
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let mut client = ServerReflectionClient::new(channel);
    let answer = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("an answer");
    let message = answer
        .into_inner()
        .message()
        .await
        .expect("a message")
        .expect("one");
    match message.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => {
            list.service.into_iter().map(|s| s.name).collect()
        }
        other => panic!("not a list of services: {other:?}"),
    }
}
